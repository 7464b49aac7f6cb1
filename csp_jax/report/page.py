"""`build_report`: everything that a run folder holds, on one self-contained HTML page."""

from __future__ import annotations

import base64
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from csp_jax.calibration.presets import PRESETS
from csp_jax.report.book import ResultBook
from csp_jax.report.curves import reliability
from csp_jax.report.dots import dot_table
from csp_jax.report.figures import first_seed, reliability_panel, roc_panel
from csp_jax.report.headline import BASE, headline
from csp_jax.report.inputs import RunInfo, Strip, load_loss_curves, load_results, load_run, load_strip
from csp_jax.report.losses import loss_panels
from csp_jax.report.predictions import Predictions, load_all_predictions
from csp_jax.report.series import Key, before_and_after, colour_class, is_main, label, ordered, ordered_splits
from csp_jax.report.tables import (
    DIRECT_COLUMNS,
    MAIN_COLUMNS,
    RATE_COLUMNS,
    Column,
    all_numbers,
    blocks,
    change_blocks,
    number,
)

# A diagram's own ECE and the one in results.json may differ by rounding only.
SAME_ECE = 5e-4
AT_A_GLANCE = (
    (Column("ece", "ECE", -1), "ECE"),
    (Column("brier", "Brier", -1), "Brier"),
    (Column("auc_correctness", "AUC", 1), "AUC"),
    (Column("accuracy", "Acc", 1), "Accuracy"),
)
DIRECT = tuple(zip(DIRECT_COLUMNS, ("Accuracy", "Precision", "Recall", "F1")))

AllPredictions = dict[Key, dict[int | None, Predictions]]


def build_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report/index.html` from the run's files and return its path.

    Needs results.json; run.json, predictions/, train/ and strip.json are shown where they are there.
    Raises UserError (file, field, value, mend) for a missing results.json or any malformed input.
    """
    book = ResultBook(load_results(run_dir / "results.json"))
    run = load_run(run_dir)
    predictions = load_all_predictions(run_dir / "predictions")
    strip = load_strip(run_dir)
    context: dict[str, Any] = {
        "run": run,
        "classwise": PRESETS[run.preset].pair == "classwise",
        "convention": PRESETS[run.preset].describe(run.bins),
        "book": book,
        "headline": headline(book),
        **_table_context(book),
        **_diagram_context(predictions, book, run),
        "strip": _strip_context(strip),
        "losses": loss_panels(load_loss_curves(run_dir / "train")),
        "configuration": yaml.safe_dump(run.configuration, sort_keys=False, allow_unicode=True),
        "seconds": sum(stage.seconds for stage in run.stages),
        "longest": max((stage.seconds for stage in run.stages), default=0.0),
    }
    page = environment().get_template("page.html").render(context)
    return write_page(run_dir / "report" / "index.html", page)


def environment() -> Environment:
    """Where the templates are, and what they may call."""
    environment = Environment(
        loader=PackageLoader("csp_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["percent"] = percent
    return environment


def percent(share: float, digits: int = 0) -> str:
    """A share in [0, 1] as percent; "–" where it is nan."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}%"


def duration(seconds: float) -> str:
    """ "8.4 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def write_page(target: Path, page: str) -> Path:
    """Write through a neighbour and rename, so that a reader never meets half a page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def _table_context(book: ResultBook) -> dict[str, Any]:
    direct = [key for key in book.keys if any(r.key == key and r.metric == "direct_accuracy" for r in book.rows)]
    rates = book.shares(column.metric for column in RATE_COLUMNS)
    return {
        "main_blocks": blocks(book, book.keys, MAIN_COLUMNS, references=True),
        "glance": dot_table(book, book.keys, AT_A_GLANCE),
        "direct": dot_table(book, direct, DIRECT),
        "direct_blocks": blocks(book, direct, DIRECT_COLUMNS, references=False) if direct else [],
        "change_blocks": change_blocks(book),
        "rate_blocks": blocks(rates, rates.keys, RATE_COLUMNS, references=False) if rates.rows else [],
        "largest_rates": {column.metric: rates.largest(column.metric) for column in RATE_COLUMNS},
        "numbers": all_numbers(book),
        "ablations": any(not is_main(key) for key in book.keys),
    }


def _diagram_context(predictions: AllPredictions, book: ResultBook, run: RunInfo) -> dict[str, Any]:
    names = {name for seeds in predictions.values() for each in seeds.values() for name in each.split_names}
    splits = ordered_splits(names)
    featured = before_and_after(predictions)
    base = predictions.get(BASE)

    def row(key: Key) -> dict[str, Any]:
        before = base if key != BASE else None
        panels = [reliability_panel(key, predictions[key], before, split, run.preset, run.bins) for split in splits]
        return {
            "name": label(key),
            "colour": colour_class(key),
            "panels": panels,
            "seeds": len(predictions[key]),
            "seed": first_seed(predictions[key])[0],
        }

    shown = [(key, predictions[key]) for key in featured]
    return {
        "reliability_rows": [row(key) for key in featured],
        "more_reliability_rows": [row(key) for key in ordered(predictions) if key not in featured],
        "roc_key": [(label(key), colour_class(key)) for key in featured],
        "roc_rows": [
            ("Right against wrong, ranked by the confidence of the chosen answer", "correctness"),
            ("Yes against no, ranked by the confidence in yes", "classwise"),
        ],
        "roc_panels": {
            "correctness": [roc_panel(shown, split, classwise=False) for split in splits],
            "classwise": [roc_panel(shown, split, classwise=True) for split in splits],
        },
        "unparsable_drawn": any(
            np.isnan(each.confidence).any() for seeds in predictions.values() for each in seeds.values()
        ),
        "differences": _differences(predictions, book, run),
    }


def _differences(predictions: AllPredictions, book: ResultBook, run: RunInfo) -> list[str]:
    """Where the predictions' ECE in the page's bins is not the one in results.json: said, not hidden."""
    lines = []
    for row in book.rows:
        each = predictions.get(row.key, {}).get(row.seed)
        if row.metric != "ece" or each is None or row.split not in each.split_names:
            continue
        drawn = reliability(each, row.split, run.preset, run.bins).ece
        if not abs(row.value - drawn) <= SAME_ECE:
            lines.append(f"{label(row.key)}, {row.split}: {number(drawn)} drawn, {number(row.value)} reported")
    return lines


def _strip_context(strip: Strip | None) -> dict[str, Any] | None:
    if strip is None:
        return None
    names = list(dict.fromkeys(name for level in strip.levels for name in level.says))
    return {
        "question": strip.question,
        "truth": strip.truth,
        "levels": [
            {
                "visible": f"{level.visible:g}%",
                "image": base64.b64encode(level.image.read_bytes()).decode("ascii"),
            }
            for level in strip.levels
        ],
        "rows": [
            {
                "name": label(_strip_key(name)),
                "colour": colour_class(_strip_key(name)),
                "says": [level.says.get(name) for level in strip.levels],
            }
            for name in names
        ],
    }


def _strip_key(name: str) -> Key:
    """The model behind a name such as "sft+simpo (evidence)"."""
    model, _, recipe = name.partition(" (")
    return Key(model, recipe.removesuffix(")"))
