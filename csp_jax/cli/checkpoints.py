"""Commands about checkpoints: read, write, compare with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csp_jax.cli.app import AdapterFolder, AsJson, app, check_choice, configure_jax, print_rows
from csp_jax.errors import UserError

PRECISIONS = ("stored", "float32", "float16", "bfloat16")


def _precision(name: str) -> Any:
    import jax.numpy as jnp

    check_choice("--dtype", "precision", name, PRECISIONS)
    return None if name == "stored" else jnp.dtype(name)


@app.command("import")
def import_command(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in the hub's layout: safetensors or .bin")],
    out: Annotated[Path, typer.Argument(help="a new folder, weights stacked and ready for any mesh")],
    dtype: Annotated[str, typer.Option(help="stored (as in the files), float32, float16 or bfloat16")] = "stored",
) -> None:
    """Turn a checkpoint of the hub into one that starts faster; all commands read both."""
    from csp_jax.models.registry import import_model
    from csp_jax.train.loop import checkpoint_folder

    import_model(checkpoint_folder(str(checkpoint)), out, _precision(dtype))
    typer.echo(f"{dtype} checkpoint: {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    out: Annotated[Path, typer.Argument(help="a new folder in the hub's layout")],
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or stored (as in the files)")] = "stored",
    adapter: AdapterFolder = None,
) -> None:
    """Write a checkpoint in the hub's layout, in the precision asked for; adapters are merged."""
    from csp_jax.models.registry import load_model
    from csp_jax.train.checkpoint import export_model
    from csp_jax.train.loop import checkpoint_folder

    precision = _precision(dtype)
    if out.exists():
        raise UserError("is there already", file=out, mend="Choose another folder or delete it")
    folder = checkpoint_folder(str(checkpoint))
    export_model(out, load_model(folder, dtype=precision, adapter=adapter), folder, precision)
    typer.echo(f"{dtype} checkpoint: {out}")


@app.command()
def parity(
    folders: Annotated[list[Path], typer.Argument(help="folders of a checkpoint, inputs and reference outputs")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the largest differences as a Markdown table")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare ports with their originals, case by case; the status is 1 where a difference is past its limit."""
    from csp_jax.parity.checks import parity as compare
    from csp_jax.parity.checks import summary

    configure_jax()
    checks = compare(folders)
    rows = [check.row() for check in checks]
    if not as_json:
        rows = [{**row, "difference": "" if row["difference"] is None else f"{row['difference']:.2g}"} for row in rows]
        rows = [{**row, "limit": f"{row['limit']:.0e}" if row["limit"] else "0"} for row in rows]
    if markdown:
        typer.echo(summary(checks))
    else:
        print_rows(rows, as_json, "Against the originals")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
