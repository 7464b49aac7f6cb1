"""The figures of the page as coordinates; templates/figures.html turns them into SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from csp_jax.report.curves import Reliability, reliability, split_roc
from csp_jax.report.drawing import Scale, path
from csp_jax.report.predictions import Predictions
from csp_jax.report.series import Key, colour_class
from csp_jax.report.tables import number

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
    """One bin of a reliability diagram, in pixels; `low` and `high` end its interval."""

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
    largest: int
    points: list[Point]
    bars: list[Bar]
    line: str
    other_seeds: list[str]
    before: str


def _bin_line(bins: Reliability) -> str:
    filled = np.flatnonzero(bins.count)
    return path((SQUARE_X(bins.probability[k]), SQUARE_Y(bins.frequency[k])) for k in filled)


def reliability_panel(
    key: Key, seeds: Seeds, before: Seeds | None, split: str, preset: str, bins: int
) -> ReliabilityPanel:
    """The diagram of the first seed in full, with the other seeds and the base's line behind it."""
    chosen, predictions = first_seed(seeds)
    shown = reliability(predictions, split, preset, bins)
    largest = int(shown.count.max(initial=0))
    height = Scale(0, max(largest, 1), 0, COUNTS_HEIGHT)
    width = PANEL_SIDE / len(shown.count)
    others = [p for seed, p in seeds.items() if seed != chosen]
    return ReliabilityPanel(
        split=split,
        colour=colour_class(key),
        ece=number(shown.ece),
        largest=largest,
        points=[_point(shown, int(k), bins) for k in np.flatnonzero(shown.count)],
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
        other_seeds=[_bin_line(reliability(p, split, preset, bins)) for p in others],
        before=_bin_line(reliability(first_seed(before)[1], split, preset, bins)) if before else "",
    )


def _point(shown: Reliability, k: int, bins: int) -> Point:
    frequency, low, high = shown.frequency[k], shown.low[k], shown.high[k]
    return Point(
        bin=k,
        x=SQUARE_X(shown.probability[k]),
        y=SQUARE_Y(frequency),
        low=SQUARE_Y(low),
        high=SQUARE_Y(high),
        tip=f"{100 * k / bins:.3g}–{min(100 * (k + 1) / bins, 100):.3g}%: {shown.count[k]} items, stated "
        f"{shown.probability[k]:.3f}, true {frequency:.3f} ({low:.3f}–{high:.3f})",
    )


@dataclass(frozen=True)
class RocLine:
    """One model's ROC curve in a panel, with its recipe's name (or its own) and area at height `text_y`."""

    name: str
    colour: str
    path: str
    area: str
    text_y: float


@dataclass(frozen=True)
class RocPanel:
    split: str
    lines: list[RocLine]


def roc_panel(models: Sequence[tuple[Key, Seeds]], split: str, classwise: bool) -> RocPanel:
    """The ROC curves of several models (first seeds) on one split: yes against no, or right against wrong."""
    lines = []
    for index, (key, seeds) in enumerate(models):
        curve = split_roc(first_seed(seeds)[1], split, classwise)
        points = zip(curve.false_positive, curve.true_positive) if curve else ()
        lines.append(
            RocLine(
                name=key.recipe or key.model,
                colour=colour_class(key),
                path=path((SQUARE_X(x), SQUARE_Y(y)) for x, y in points),
                area=number(curve.area()) if curve else "–",
                text_y=PANEL_TOP + PANEL_SIDE - 8 - 13 * (len(models) - 1 - index),
            )
        )
    return RocPanel(split, lines)
