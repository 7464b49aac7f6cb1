"""What the report reads from a run folder as typed records: results, the run's description, losses, strip."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from csp_jax.calibration.presets import PRESETS
from csp_jax.errors import UserError
from csp_jax.report.fields import Fields, read_json
from csp_jax.report.series import Key

# Metrics that are shares, probabilities or gaps between them: a value outside [0, 1] is a mistake of units.
UNIT_METRICS = frozenset(
    {"accuracy", "f1", "precision", "recall", "auc_correctness", "auc_classwise", "brier", "ece", "mce"}
    | {"smooth_ece", "null_ece", "best_constant_brier"}
    | {"direct_accuracy", "direct_f1", "direct_precision", "direct_recall"}
)
# Metrics that count items: `value` is a whole number of the n.
COUNT_METRICS = frozenset({"ties", "unparsable"})


@dataclass(frozen=True)
class ResultRow:
    """One figure of results.json; `value`, `low`, `high` are nan where undefined or not measured."""

    key: Key
    split: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    seed: int | None


def load_results(path: Path) -> list[ResultRow]:
    """The rows of results.json, in file order; UserError where it is missing, empty or a field is bad."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise UserError(
            "must be a JSON array with at least one row",
            file=path,
            mend="evaluate at least one model into this run folder",
        )
    return [_result_row(Fields(entry, path, f"[{index}]")) for index, entry in enumerate(content)]


def _result_row(fields: Fields) -> ResultRow:
    metric = fields.text("metric")
    low, high = (0.0, 1.0) if metric in UNIT_METRICS else (-math.inf, math.inf)
    if metric in COUNT_METRICS:
        fields.whole("value")
    row = ResultRow(
        key=Key(fields.text("model"), fields.text("recipe", "")),
        split=fields.text("split"),
        metric=metric,
        value=fields.number("value", low=low, high=high),
        low=fields.number("low", math.nan, low, high),
        high=fields.number("high", math.nan, low, high),
        n=fields.whole("n"),
        seed=fields.whole("seed", None),
    )
    if row.low > row.high:
        raise fields.bad("low", f"must not exceed high ({row.high:g})")
    return row


@dataclass(frozen=True)
class Stage:
    """One timed stage of the run; `seconds` of wall clock."""

    name: str
    seconds: float


@dataclass(frozen=True)
class RunInfo:
    """run.json: what was run, with what, where and how long. Every field may be left out.

    `preset` and `bins` come from its "conventions", as `csp_jax.calibration.presets.conventions` writes them.
    """

    name: str
    configuration: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    stages: tuple[Stage, ...] = ()
    machine: str = ""
    notes: tuple[str, ...] = ()
    preset: str = "csp-classwise"
    bins: int = 10
    interval: str = ""


def load_run(run_dir: Path) -> RunInfo:
    """run.json of a run folder; where there is none, only the folder's name and the default conventions."""
    path = run_dir / "run.json"
    if not path.exists():
        return RunInfo(name=run_dir.resolve().name)
    fields = Fields(read_json(path), path)
    conventions = Fields(fields.table("conventions", {}), path, "conventions")
    preset = conventions.text("preset", RunInfo.preset)
    if preset not in PRESETS:
        raise conventions.bad("preset", "is not a preset", f"use one of {', '.join(PRESETS)}")
    return RunInfo(
        name=fields.text("name", run_dir.resolve().name),
        configuration=fields.table("configuration", {}),
        versions={name: str(version) for name, version in fields.table("versions", {}).items()},
        seeds=_seeds(fields),
        stages=_stages(fields),
        machine=_machine(fields),
        notes=_strings(fields, "notes"),
        preset=preset,
        bins=conventions.whole("bins", RunInfo.bins, least=1),
        interval=_interval(conventions),
    )


def _interval(conventions: Fields) -> str:
    """What the intervals of results.json are, in words; "" where the run does not say."""
    level = conventions.number("level", None, low=0.0, high=1.0)
    resamples = conventions.whole("resamples", None)
    if level is None:
        return ""
    how = f", {resamples} bootstrap resamples of images" if resamples else ""
    return f"{100 * level:g}% intervals{how}"


def _stages(fields: Fields) -> tuple[Stage, ...]:
    entries = (Fields(entry, fields.file, f"stages[{i}]") for i, entry in enumerate(fields.items("stages", [])))
    return tuple(Stage(entry.text("name"), entry.number("seconds", low=0.0)) for entry in entries)


def _seeds(fields: Fields) -> tuple[int, ...]:
    seeds = fields.items("seeds", [])
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise fields.bad("seeds", "must be a list of whole numbers")
    return tuple(seeds)


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    values = fields.items(name, [])
    if not all(isinstance(value, str) for value in values):
        raise fields.bad(name, "must be a list of strings")
    return tuple(values)


def _machine(fields: Fields) -> str:
    """A line of text, or an object whose entries are joined into one."""
    machine = fields.content.get("machine", "")
    if isinstance(machine, str):
        return machine
    return ", ".join(f"{name} {value}" for name, value in fields.table("machine").items())


@dataclass(frozen=True)
class LossCurve:
    """The loss of one training stage: `steps` and `losses` of equal length, non-finite ones counted apart."""

    recipe: str
    stage: str
    seed: int | None
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    not_finite: int


def load_loss_curves(train_dir: Path) -> list[LossCurve]:
    """One curve for each train/<recipe>-<stage>[-seedN]/metrics.jsonl, ordered by folder name."""
    return [_loss_curve(path) for path in sorted(train_dir.glob("*/metrics.jsonl"))]


def _loss_curve(path: Path) -> LossCurve:
    seed = re.search(r"-seed(\d+)$", path.parent.name)
    recipe, _, stage = path.parent.name[: seed.start() if seed else None].partition("-")
    return curve_of(load_metrics(path), "loss", recipe, stage, int(seed[1]) if seed else None)


def load_metrics(path: Path) -> list[Fields]:
    """The lines of a metrics.jsonl; UserError names one that is broken."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, mend="name the folder of a training") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lines.append(Fields(json.loads(line), path, f"line {number}"))
        except ValueError as error:
            raise UserError(f"line {number} is not JSON ({error})", file=path, mend="remove the broken line") from error
    return lines


def curve_of(lines: list[Fields], metric: str, recipe: str, stage: str, seed: int | None = None) -> LossCurve:
    """A metric of the lines that have it."""
    found = [(line.whole("step"), line.number(metric)) for line in lines if metric in line.content]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return LossCurve(
        recipe=recipe,
        stage=stage,
        seed=seed,
        steps=tuple(step for step, _ in finite),
        losses=tuple(value for _, value in finite),
        not_finite=len(found) - len(finite),
    )


@dataclass(frozen=True)
class Level:
    """One noise level: `visible` percent, the picture, and each model's c(yes), c(no) in [0, 1] or nan."""

    visible: float
    image: Path
    says: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Strip:
    """One question about one picture under growing noise."""

    question: str
    truth: str
    levels: tuple[Level, ...]


def load_strip(run_dir: Path) -> Strip | None:
    """strip.json with its pictures checked (inside the run folder, decodable); None where there is none."""
    path = run_dir / "strip.json"
    if not path.exists():
        return None
    fields = Fields(read_json(path), path)
    levels = [_level(Fields(entry, path, f"levels[{i}]"), run_dir) for i, entry in enumerate(fields.items("levels"))]
    if not levels:
        raise fields.bad("levels", "must hold at least one level")
    return Strip(fields.text("question"), fields.text("truth"), tuple(levels))


def _level(fields: Fields, run_dir: Path) -> Level:
    says = fields.child("says")
    answers = {name: Fields(entry, fields.file, says.path(name)) for name, entry in says.content.items()}
    return Level(
        visible=fields.number("confidence", low=0.0, high=100.0),
        image=_picture(fields, run_dir),
        says={
            name: (entry.number("yes", low=0.0, high=1.0), entry.number("no", low=0.0, high=1.0))
            for name, entry in answers.items()
        },
    )


def _picture(fields: Fields, run_dir: Path) -> Path:
    path = (run_dir / fields.text("image")).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise fields.bad("image", "lies outside the run folder", "copy the picture into the run folder")
    try:
        with Image.open(path) as image:
            image.load()
            known = image.format == "PNG"
    except (OSError, SyntaxError) as error:
        raise fields.bad("image", f"cannot be read as a picture ({error})", "write the strip again") from error
    if not known:
        raise fields.bad("image", "is not a PNG file", "write the strip's pictures as PNG")
    return path
