"""The figures of the page as coordinates; templates/figures.html turns them into SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from csp_jax.report.book import ResultBook, Value
from csp_jax.report.curves import (
    Reliability,
    Roc,
    answered_right,
    forecasts,
    reliability,
    roc,
    top_confidence,
)
from csp_jax.report.drawing import Scale, Tick, path, round_steps, ticks
from csp_jax.report.predictions import Predictions
from csp_jax.report.series import Key, colour_class, label
from csp_jax.report.tables import Column, interval, number

Seeds = Mapping[int | None, Predictions]

# Reliability and ROC panels share one square of 186 px; the counts stand below it.
PANEL_WIDTH, PANEL_LEFT, PANEL_SIDE, PANEL_TOP = 220, 26, 186, 6
COUNTS_TOP, COUNTS_HEIGHT = 222, 34
SQUARE_X = Scale(0, 1, PANEL_LEFT, PANEL_LEFT + PANEL_SIDE)
SQUARE_Y = Scale(0, 1, PANEL_TOP + PANEL_SIDE, PANEL_TOP)


def first_seed(seeds: Seeds) -> tuple[int | None, Predictions]:
    """The predictions that a figure draws in full: the lowest seed's."""
    return min(seeds.items(), key=lambda item: -1 if item[0] is None else item[0])


@dataclass(frozen=True)
class Point:
    """One bin of a reliability diagram, in pixels; `low` and `high` end its interval; `bar` is its count's height."""

    bin: int
    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Bar:
    """The count of one bin: a rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float
    count: int


@dataclass(frozen=True)
class ReliabilityPanel:
    """One split's reliability diagram of one model. `other_seeds`, `before`: paths of faint lines."""

    split: str
    colour: str
    ece: str
    items: int
    unparsable: int
    largest: int
    points: list[Point]
    bars: list[Bar]
    line: str
    other_seeds: list[str]
    before: str


def _bin_line(bins: Reliability) -> str:
    filled = np.flatnonzero(bins.count)
    return path((SQUARE_X(bins.probability[k]), SQUARE_Y(bins.frequency[k])) for k in filled)


def split_reliability(predictions: Predictions, split: str, preset: str, bins: int) -> Reliability:
    """The bins of one split under the run's preset."""
    data = forecasts(*predictions.of_split(split), preset)
    return reliability(data.probability, data.outcome, bins)


def reliability_panel(
    key: Key, seeds: Seeds, before: Seeds | None, split: str, preset: str, bins: int
) -> ReliabilityPanel:
    """The diagram of the first seed in full, with the other seeds and the base's line behind it."""
    chosen, predictions = first_seed(seeds)
    data = forecasts(*predictions.of_split(split), preset)
    shown = reliability(data.probability, data.outcome, bins)
    largest = int(shown.count.max(initial=0))
    height = Scale(0, max(largest, 1), 0, COUNTS_HEIGHT)
    width = PANEL_SIDE / bins
    others = [p for seed, p in seeds.items() if seed != chosen]
    return ReliabilityPanel(
        split=split,
        colour=colour_class(key),
        ece=number(shown.ece()),
        items=len(data.probability),
        unparsable=data.unparsable,
        largest=largest,
        points=[_point(shown, k, bins) for k in np.flatnonzero(shown.count)],
        bars=[
            Bar(
                round(PANEL_LEFT + k * width + 0.75, 2),
                round(COUNTS_TOP + COUNTS_HEIGHT - height(n), 2),
                round(width - 1.5, 2),
                height(n),
                int(n),
            )
            for k, n in enumerate(shown.count)
            if n
        ],
        line=_bin_line(shown),
        other_seeds=[_bin_line(split_reliability(p, split, preset, bins)) for p in others],
        before=_bin_line(split_reliability(first_seed(before)[1], split, preset, bins)) if before else "",
    )


def _point(shown: Reliability, k: int, bins: int) -> Point:
    frequency, low, high = shown.frequency[k], shown.low[k], shown.high[k]
    return Point(
        bin=int(k),
        x=SQUARE_X(shown.probability[k]),
        y=SQUARE_Y(frequency),
        low=SQUARE_Y(low),
        high=SQUARE_Y(high),
        tip=f"{100 * k / bins:g}–{100 * (k + 1) / bins:g}%: {shown.count[k]} items, stated "
        f"{shown.probability[k]:.3f}, true {frequency:.3f} ({low:.3f}–{high:.3f})",
    )


@dataclass(frozen=True)
class RocLine:
    """One model's ROC curve in a panel, with its name and area at height `text_y`."""

    name: str
    colour: str
    path: str
    area: str
    text_y: float


@dataclass(frozen=True)
class RocPanel:
    split: str
    lines: list[RocLine]


def _split_roc(predictions: Predictions, split: str, classwise: bool) -> Roc | None:
    confidence, truth = predictions.of_split(split)
    if classwise:
        score, positive = confidence[:, 0], truth == 0
    else:
        score, positive = top_confidence(confidence), answered_right(confidence, truth)
    # An item without a readable confidence ranks below every stated one.
    return roc(np.where(np.isnan(score), -1.0, score), positive.astype(np.int64))


def roc_panel(models: Sequence[tuple[Key, Seeds]], split: str, classwise: bool) -> RocPanel:
    """The ROC curves of several models (first seeds) on one split: yes against no, or right against wrong."""
    lines = []
    for index, (key, seeds) in enumerate(models):
        curve = _split_roc(first_seed(seeds)[1], split, classwise)
        points = zip(curve.false_positive, curve.true_positive) if curve else ()
        lines.append(
            RocLine(
                name=label(key),
                colour=colour_class(key),
                path=path((SQUARE_X(x), SQUARE_Y(y)) for x, y in points),
                area=number(curve.area()) if curve else "–",
                text_y=PANEL_TOP + PANEL_SIDE - 8 - 13 * (len(models) - 1 - index),
            )
        )
    return RocPanel(split, lines)


# Dot panels: a row for each model, a thin line for each split inside it.
DOT_WIDTH, DOT_LEFT, DOT_RIGHT, DOT_TOP, DOT_STEP, DOT_GAP = 300, 118, 14, 8, 5, 12


@dataclass(frozen=True)
class Mark:
    """One split's figure in a model's row: a dot at x with its interval."""

    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class DotRow:
    """A model's row: its marks, and its mean over the splits as a tick (None without one)."""

    name: str
    colour: str
    middle: float
    top: float
    bottom: float
    marks: list[Mark]
    mean: float | None
    mean_text: str


@dataclass(frozen=True)
class DotPanel:
    """One metric over all models and splits."""

    title: str
    arrow: str
    height: float
    bottom: float
    ticks: list[Tick]
    rows: list[DotRow]


def dot_panel(book: ResultBook, keys: Sequence[Key], column: Column, title: str) -> DotPanel | None:
    """A metric's figures by model and split, on an axis that starts at 0; None where no model has any."""
    cells = {key: [(split, book.cell(key, split, column.metric)) for split in book.splits] for key in keys}
    ends = [
        end
        for row in cells.values()
        for _, value in row
        if value is not None
        for end in (value.value, value.high)
        if not math.isnan(end)
    ]
    if not ends:
        return None
    top = 1.0 if max(ends) > 0.5 else max(ends)
    steps = round_steps(0.0, top, about=4)
    scale = Scale(0.0, steps[-1], DOT_LEFT, DOT_WIDTH - DOT_RIGHT)
    pitch = DOT_STEP * len(book.splits) + DOT_GAP
    rows = [
        _dot_row(key, cells[key], book.mean(key, column.metric), scale, DOT_TOP + index * pitch, pitch)
        for index, key in enumerate(keys)
        if any(value is not None for _, value in cells[key])
    ]
    bottom = DOT_TOP + pitch * len(rows)
    return DotPanel(title, column.arrow, bottom + 20, bottom, ticks(scale, steps), rows)


def _dot_row(
    key: Key,
    cells: Sequence[tuple[str, Value | None]],
    mean: Value | None,
    scale: Scale,
    top: float,
    pitch: float,
) -> DotRow:
    marks = []
    for index, (split, value) in enumerate(cells):
        if value is None or math.isnan(value.value):
            continue
        low, high = (value.value if math.isnan(end) else end for end in (value.low, value.high))
        y = top + (pitch - DOT_STEP * (len(cells) - 1)) / 2 + index * DOT_STEP
        tip = f"{label(key)}, {split}: {number(value.value)} {interval(value)}".strip()
        marks.append(Mark(scale(value.value), y, scale(low), scale(high), tip))
    return DotRow(
        name=label(key),
        colour=colour_class(key),
        middle=top + pitch / 2,
        top=top,
        bottom=top + pitch,
        marks=marks,
        mean=None if mean is None else scale(mean.value),
        mean_text="" if mean is None else number(mean.value),
    )
