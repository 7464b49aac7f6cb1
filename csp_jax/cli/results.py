"""Commands about what came out, and about this installation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from csp_jax import __version__
from csp_jax.cli.app import AsJson, app, print_rows


@app.command()
def metrics(
    file: Annotated[Path, typer.Argument(help='lines of {"id", "confidence", "correct"}')],
    bins: Annotated[int, typer.Option(help="bins of equal width")] = 10,
    preset: Annotated[str, typer.Option(help="top-label, csp-classwise, torchmetrics or netcal")] = "top-label",
    percent: Annotated[bool, typer.Option("--percent", help="plain numbers are percents")] = False,
    as_json: AsJson = False,
) -> None:
    """Every calibration metric of any model's answers."""
    from csp_jax.calibration.answers_file import metrics_of_file

    found = metrics_of_file(file, bins=bins, preset=preset, percent=percent)
    if as_json:
        print_rows([_without_nan(found)], True, "")
        return
    intervals = found["intervals"]
    rows = [
        {
            "metric": name,
            "value": value,
            "low": intervals.get(name, ("", ""))[0],
            "high": intervals.get(name, ("", ""))[1],
        }
        for name, value in found.items()
        if isinstance(value, int | float)
    ]
    print_rows(rows, False, found["convention"])


def _without_nan(value: Any) -> Any:
    """Undefined numbers as null: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder, or that of a training")]) -> None:
    """Draw a run folder's page again: what results.json holds, or a training's metrics."""
    from csp_jax.report import build_any_report

    typer.echo(f"report: {build_any_report(run)}")


@app.command()
def doctor(
    config: Annotated[bool, typer.Option("--config", help="list every field of a training's configuration")] = False,
) -> None:
    """Versions and devices; with --config every field of a training's configuration, its type and default."""
    if config:
        from csp_jax.config import TrainConfig, describe_fields

        print_rows(describe_fields(TrainConfig), False, "csp train")
        return
    from importlib.metadata import version

    import jax

    names = (
        "csp_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "numpy",
    )
    rows = [{"what": name, "found": version(name)} for name in names]
    rows.append({"what": "devices", "found": ", ".join(str(device) for device in jax.devices())})
    print_rows(rows, False, f"csp_jax {__version__}")
