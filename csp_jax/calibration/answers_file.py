"""Calibration metrics of a plain JSON Lines file of answers, whatever made them.

One object a line: `id` (text or whole number, once), `confidence` (a number in [0, 1], a text like "73%",
or with `percent` a number in [0, 100]), `correct` (true/false or 1/0); optional `image_id` (what the
bootstrap draws together) and `weight` (a count, 1 if absent). Other fields are left alone; blank lines are
skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from csp_jax.calibration import metrics
from csp_jax.calibration.binning import bin_count
from csp_jax.calibration.bootstrap import bootstrap, null_ece_of
from csp_jax.calibration.presets import PRESETS, conventions, get_preset
from csp_jax.calibration.scores import PairScores, make_pairs
from csp_jax.errors import UserError

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_EXAMPLE = '{"id": "q1", "confidence": 0.73, "correct": true}'


@dataclass(frozen=True)
class Answers:
    """The file's columns: `confidence` whole percents (integers) if all are, else probabilities (float64)."""

    ids: list[str | int]
    confidence: Shaped[np.ndarray, " n"]
    correct: Float[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    image_ids: list[str | int] | None


@dataclass(frozen=True)
class _Place:
    """A line, to name in errors."""

    path: Path
    line: int

    def error(self, problem: str, field: str | None = None, value: object = None, mend: str | None = None) -> UserError:
        return UserError(problem, file=f"{self.path}:{self.line}", field=field, value=value, mend=mend)


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is not a number")


def _refuse_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'the field "{name}" stands twice')
    return dict(items)


def _rows(path: Path) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """The objects of a file with their places. Raises UserError for what is not an object."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8 text", file=path, mend="Save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})",
            file=path,
            mend="Give the path of a JSON Lines file",
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = _Place(path, number)
        try:
            row = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)
        except (ValueError, RecursionError) as error:
            raise place.error(f"is not valid JSON ({error})", mend=f"Write one object a line, as {_EXAMPLE}") from error
        if not isinstance(row, dict):
            raise place.error("is not a JSON object", value=row, mend=f"Write one object a line, as {_EXAMPLE}")
        yield place, row


def _field(place: _Place, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise place.error("is missing", name, mend=f"Every line needs id, confidence and correct, as {_EXAMPLE}")
    return row[name]


def _name(place: _Place, row: dict[str, Any], field: str) -> str | int:
    value = _field(place, row, field)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise place.error("is not a text or a whole number", field, value, f"Give each line's {field} as a text")
    return value


def _number(place: _Place, field: str, value: Any, mend: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise place.error("is not a number", field, value, mend)
    return float(value)


def _confidence(place: _Place, row: dict[str, Any], percent: bool) -> tuple[float, bool]:
    """The value and whether it is a percent."""
    value = _field(place, row, "confidence")
    if isinstance(value, str):
        found = _PERCENT.fullmatch(value)
        if found is None:
            raise place.error("is a text but no percent", "confidence", value, 'Write 0.73 or "73%"')
        value, percent = float(found[1]), True
    scale = "[0, 100]" if percent else "[0, 1]"
    number = _number(place, "confidence", value, f"Give a number in {scale}")
    if not 0 <= number <= (100 if percent else 1):
        hint = "" if percent or not 1 < number <= 100 else "; for percents use --percent"
        raise place.error(f"is outside {scale}", "confidence", row["confidence"], f"Give a number in {scale}{hint}")
    return number, percent


def _correct(place: _Place, row: dict[str, Any]) -> float:
    value = _field(place, row, "correct")
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise place.error("is neither true nor false", "correct", value, "Use true or false, or 1 or 0")
    return float(value)


def _weight(place: _Place, row: dict[str, Any]) -> float:
    number = _number(place, "weight", row.get("weight", 1), "Give a count, 0 or more")
    if number < 0:
        raise place.error("is negative", "weight", number, "Give a count, 0 or more")
    return number


def read_answers(path: str | Path, *, percent: bool = False) -> Answers:
    """Reads and checks a file of answers. Raises UserError naming line, field, value and mend."""
    path = Path(path)
    first_lines: dict[str | int, int] = {}
    confidences: list[tuple[float, bool]] = []
    correct, weight, images = [], [], []
    for place, row in _rows(path):
        identity = _name(place, row, "id")
        if identity in first_lines:
            mend = f"Ids must differ; line {first_lines[identity]} has it too"
            raise place.error("stands twice", "id", identity, mend)
        first_lines[identity] = place.line
        confidences.append(_confidence(place, row, percent))
        correct.append(_correct(place, row))
        weight.append(_weight(place, row))
        if "image_id" in row:
            images.append(_name(place, row, "image_id"))
        if len(images) not in (0, len(correct)):
            mend = "Give image_id on every line or on none"
            raise place.error("stands on some lines only", "image_id", row.get("image_id"), mend)
    if not correct:
        raise UserError("has no answers", file=path, mend=f"Write one object a line, as {_EXAMPLE}")
    if not any(weight):
        raise UserError("all weights are 0", file=path, field="weight", mend="Give at least one answer a weight")
    return Answers(
        list(first_lines),
        _column(confidences),
        np.array(correct),
        np.array(weight, np.float32),
        images or None,
    )


def _column(confidences: list[tuple[float, bool]]) -> Shaped[np.ndarray, " n"]:
    if all(is_percent and value == int(value) for value, is_percent in confidences):
        return np.array([int(value) for value, _ in confidences], np.int32)
    return np.array([value / 100 if is_percent else value for value, is_percent in confidences])


def metrics_of_file(
    path: str | Path,
    *,
    bins: int = 10,
    preset: str = "top-label",
    percent: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """All scores of a file of answers (n, accuracy, ece, mce, brier, auroc, ...), intervals, conventions.

    The file's (confidence, correct) pairs are taken as they are; `preset` says how they were meant and sets
    the bins. `intervals` maps names to (low, high); `curve` is the reliability diagram. Undefined scores
    are nan. Raises UserError for mistakes in the file and unknown presets.
    """
    if preset not in PRESETS:
        mend = f"Use one of {', '.join(PRESETS)}"
        raise UserError("is not a known preset", field="preset", value=preset, mend=mend)
    if bins < 1:
        raise UserError("is not a number of bins", field="bins", value=bins, mend="Use 1 or more")
    answers = read_answers(path, percent=percent)
    binning = get_preset(preset).binning
    pairs = make_pairs(answers.confidence, answers.correct, bins, binning)
    statistic = PairScores(bins, bin_count(bins, binning))
    options: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    found = bootstrap(statistic, pairs, clusters=answers.image_ids, weight=answers.weight, **options)
    sums = metrics.bin_sums(answers.confidence, answers.correct, answers.weight, bins=bins, binning=binning)
    return {
        "n": len(answers.ids),
        "weight": float(answers.weight.sum()),
        **{name: interval.value for name, interval in found.items()},
        "null_ece": null_ece_of(pairs, statistic.rows, seed, weight=answers.weight),
        "base_rate": found["accuracy"].value,
        "best_constant_brier": float(metrics.best_constant_brier(answers.correct, answers.weight)),
        **conventions(preset, bins, level, resamples),
        "clustered_by": "answer" if answers.image_ids is None else "image_id",
        "intervals": {name: (interval.low, interval.high) for name, interval in found.items()},
        "curve": {
            name: np.asarray(values, np.float64).tolist()
            for name, values in metrics.reliability_curve(sums, level)._asdict().items()
        },
    }
