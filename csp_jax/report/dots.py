"""The dot table: models down, metrics across, in each cell a dot and an interval for every split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from csp_jax.report.book import ResultBook, Value
from csp_jax.report.drawing import Scale, Tick, round_steps, ticks
from csp_jax.report.series import Key, colour_class, label
from csp_jax.report.tables import Column, interval, number

# A cell is WIDTH units wide (stretched to the column) and LINE units high for each split, with MARGIN around.
WIDTH, LINE, MARGIN = 100, 5, 6


@dataclass(frozen=True)
class Mark:
    """One split's figure: a dot at x with its interval from `low` to `high`, `y` down the cell."""

    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class DotCell:
    """One model under one metric; `mean` over the splits is None where a split has no value."""

    marks: list[Mark]
    mean: float | None
    mean_text: str


@dataclass(frozen=True)
class DotRow:
    name: str
    colour: str
    cells: list[DotCell]


@dataclass(frozen=True)
class DotTable:
    """`heads`: title, arrow and ticks (percent of the width) of each metric; `height` of a row in units."""

    heads: list[tuple[str, str, list[Tick]]]
    rows: list[DotRow]
    height: int


def dot_table(book: ResultBook, keys: Sequence[Key], columns: Sequence[tuple[Column, str]]) -> DotTable | None:
    """The dot table of the metrics that any of the models has; None where there is none."""
    scales = [(column, title, _scale(book, keys, column)) for column, title in columns]
    shown = [(column, title, scale) for column, title, scale in scales if scale is not None]
    if not shown:
        return None
    rows = [
        DotRow(label(key), colour_class(key), [_cell(book, key, column, scale[0]) for column, _, scale in shown])
        for key in keys
    ]
    heads = [(title, column.arrow, scale[1]) for column, title, scale in shown]
    return DotTable(heads, rows, 2 * MARGIN + LINE * (len(book.splits) - 1))


def _scale(book: ResultBook, keys: Sequence[Key], column: Column) -> tuple[Scale, list[Tick]] | None:
    """An axis that holds every figure and interval: from 0 where lower is better, else up to 1."""
    cells = [book.cell(key, split, column.metric) for key in keys for split in book.splits]
    ends = [end for cell in cells if cell for end in (cell.value, cell.low, cell.high) if not math.isnan(end)]
    if not ends:
        return None
    steps = round_steps(min(ends), max(*ends, 1.0)) if column.better > 0 else round_steps(0.0, max(ends), about=3)
    scale = Scale(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1, 0, WIDTH)
    return scale, ticks(scale, steps)


def _cell(book: ResultBook, key: Key, column: Column, scale: Scale) -> DotCell:
    marks = []
    for index, split in enumerate(book.splits):
        value = book.cell(key, split, column.metric)
        if value is not None and not math.isnan(value.value):
            marks.append(_mark(value, scale, MARGIN + LINE * index, f"{label(key)}, {split}"))
    mean = book.mean(key, column.metric)
    return DotCell(marks, scale(mean.value) if mean else None, number(mean.value) if mean else "")


def _mark(value: Value, scale: Scale, y: float, name: str) -> Mark:
    low, high = (scale(value.value if math.isnan(end) else end) for end in (value.low, value.high))
    return Mark(scale(value.value), y, low, high, f"{name}: {number(value.value)} {interval(value)}".strip())
