"""`build_training_report`: the folder of one training on one self-contained HTML page."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from csp_jax.report.fields import Fields, read_json
from csp_jax.report.inputs import LossCurve, curve_of, load_metrics
from csp_jax.report.losses import loss_panels
from csp_jax.report.page import environment, write_page

FIRST = ("loss", "grad_norm")  # of the metrics; the others follow by name


def build_training_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report/index.html` from what `csp train` left there and return its path.

    Needs metrics.jsonl; config.yaml, plan.json and versions.json are shown where they are there. Raises UserError
    (file, field, mend) where one cannot be read.
    """
    lines = load_metrics(run_dir / "metrics.jsonl")
    names = sorted({name for line in lines for name, value in line.content.items() if _is_number(name, value)})
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    curves = [curve_of(lines, name, "", name) for name in names]
    config = run_dir / "config.yaml"
    context = {
        "name": run_dir.resolve().name,
        "steps": lines[-1].whole("step") if lines else 0,
        "finished": (run_dir / "model").exists(),
        "metrics": [_numbers(curve) for curve in curves],
        "panels": [panel for curve in curves if len(set(curve.losses)) > 1 for panel in loss_panels([curve])],
        "counts": lines[-1].content.get("counts", {}) if lines else {},
        "plan": {name: _shown(name, value) for name, value in _table(run_dir / "plan.json").items()},
        "versions": _table(run_dir / "versions.json"),
        "configuration": config.read_text(encoding="utf-8") if config.exists() else "",
        "checkpoints": sorted(int(f.name) for f in (run_dir / "checkpoints").glob("*") if f.name.isdecimal()),
    }
    page = environment().get_template("training.html").render(context)
    return write_page(run_dir / "report" / "index.html", page)


def _is_number(name: str, value: object) -> bool:
    return name != "step" and isinstance(value, int | float)


def _numbers(curve: LossCurve) -> dict[str, Any]:
    """First, last, mean of a metric, as texts."""
    values = curve.losses
    texts = [f"{value:.4g}" for value in (values[0], values[-1], statistics.fmean(values))] if values else ["–"] * 3
    return {"name": curve.stage, "values": texts, "lines": len(values)}


def _table(file: Path) -> dict[str, Any]:
    return Fields(read_json(file), file).content if file.exists() else {}


def _shown(name: str, value: object) -> str:
    if name.startswith("bytes_") and isinstance(value, int):
        return f"{value / 2**30:,.2f} GiB a device"
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
