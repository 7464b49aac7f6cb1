"""The tables of the page: the main table in the form of the paper's table 1, direct answers, rates, all numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from csp_jax.report.book import ResultBook, Value
from csp_jax.report.series import Key, colour_class, group_of, is_main, label

SPLITS_PER_BLOCK = 3
MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """A metric's column: `better` is +1 where higher is better, -1 where lower is, 0 where neither."""

    metric: str
    title: str
    better: int

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.better]


MAIN_COLUMNS = (
    Column("accuracy", "Acc", 1),
    Column("f1", "F1", 1),
    Column("auc_correctness", "AUC", 1),
    Column("brier", "Brier", -1),
    Column("ece", "ECE", -1),
)
DIRECT_COLUMNS = (
    Column("direct_accuracy", "Acc", 1),
    Column("direct_precision", "Precision", 1),
    Column("direct_recall", "Recall", 1),
    Column("direct_f1", "F1", 1),
)
RATE_COLUMNS = (Column("ties", "Ties", 0), Column("unparsable", "Unparsable", 0))
# Reference rows: the metric that says what the column's figure would be for a model that knows nothing better.
REFERENCES = (
    ("Calibrated model at this n (null ECE)", "ece", "null_ece"),
    ("Best constant forecast", "brier", "best_constant_brier"),
)


@dataclass(frozen=True)
class Cell:
    """One printed figure; `interval` is "" where there is none."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table; `colour` is the CSS class of the model, "" for a reference row."""

    name: str
    colour: str
    cells: list[Cell]


@dataclass(frozen=True)
class Group:
    """Rows under one heading; "" has no heading."""

    heading: str
    lines: list[Line]


@dataclass(frozen=True)
class Block:
    """A table of up to three splits side by side, each with the same columns. `heads`: (split, items)."""

    heads: list[tuple[str, str]]
    columns: Sequence[Column]
    groups: list[Group]


def number(value: float) -> str:
    """A figure as the page prints it: three decimals, "–" where it is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def interval(value: Value) -> str:
    """ "0.052–0.081", or "" where the run gave no interval."""
    return "" if math.isnan(value.low) or math.isnan(value.high) else f"{value.low:.3f}–{value.high:.3f}"


def blocks(book: ResultBook, keys: list[Key], columns: Sequence[Column], references: bool) -> list[Block]:
    """The table of `keys` × (splits × columns), cut into blocks of three splits; the mean over splits is last."""
    splits = list(book.splits)
    if len(splits) > 1:
        splits.append(MEAN)
    cut = [splits[start : start + SPLITS_PER_BLOCK] for start in range(0, len(splits), SPLITS_PER_BLOCK)]
    return [_block(book, keys, part, columns, references) for part in cut]


def _look_up(book: ResultBook, key: Key, split: str, metric: str) -> Value | None:
    return book.mean(key, metric) if split == MEAN else book.cell(key, split, metric)


def _block(
    book: ResultBook, keys: list[Key], splits: list[str], columns: Sequence[Column], references: bool
) -> Block:
    best = {(split, column.metric): _best(book, keys, split, column) for split in splits for column in columns}

    def cell(key: Key, split: str, column: Column) -> Cell:
        value = _look_up(book, key, split, column.metric)
        if value is None:
            return Cell("–")
        text = number(value.value)
        return Cell(text, interval(value), text == best[split, column.metric])

    groups: list[Group] = []
    for key in keys:
        line = Line(
            name=label(key, with_recipe=not is_main(key)),
            colour=colour_class(key),
            cells=[cell(key, split, column) for split in splits for column in columns],
        )
        heading = group_of(key)
        if not groups or groups[-1].heading != heading:
            groups.append(Group(heading, []))
        groups[-1].lines.append(line)
    if references:
        lines = [_reference(book, keys, splits, columns, *which) for which in REFERENCES if book.has(which[2])]
        groups += [Group("For reference", lines)] if lines else []
    heads = [(split, "" if split == MEAN else book.items(split)) for split in splits]
    return Block(heads, columns, groups)


def _best(book: ResultBook, keys: list[Key], split: str, column: Column) -> str:
    """The column's best figure as printed ("" where fewer than two models have one): equal prints share it."""
    found = [_look_up(book, key, split, column.metric) for key in keys]
    values = [value.value for value in found if value is not None and not math.isnan(value.value)]
    if len(values) < 2 or not column.better:
        return ""
    return number(max(values) if column.better > 0 else min(values))


def _reference(
    book: ResultBook,
    keys: list[Key],
    splits: list[str],
    columns: Sequence[Column],
    name: str,
    beside: str,
    metric: str,
) -> Line:
    """A reference figure under the one column that it belongs to; a span where the models' differ."""

    def cell(split: str, column: Column) -> Cell:
        if column.metric != beside:
            return Cell("")
        found = [_look_up(book, key, split, metric) for key in keys]
        values = [value.value for value in found if value is not None and not math.isnan(value.value)]
        if not values:
            return Cell("–")
        low, high = number(min(values)), number(max(values))
        return Cell(low) if low == high else Cell("", f"{low}–{high}")

    return Line(name, "", [cell(split, column) for split in splits for column in columns])


@dataclass(frozen=True)
class NumberRow:
    """A row of results.json as printed in the table of all numbers."""

    model: str
    recipe: str
    seed: str
    split: str
    metric: str
    value: str
    interval: str
    n: int


def all_numbers(book: ResultBook) -> list[NumberRow]:
    """Every row of results.json, in its order, with five significant digits."""
    return [
        NumberRow(
            model=row.key.model,
            recipe=row.key.recipe,
            seed="" if row.seed is None else str(row.seed),
            split=row.split,
            metric=row.metric,
            value="–" if math.isnan(row.value) else f"{row.value:.5g}",
            interval="" if math.isnan(row.low) or math.isnan(row.high) else f"{row.low:.5g}–{row.high:.5g}",
            n=row.n,
        )
        for row in book.rows
    ]
