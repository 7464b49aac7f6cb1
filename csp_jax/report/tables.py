"""The tables of the page: the main one (in the form of [A] table 1), changes, direct answers, all numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from csp_jax.report.book import MEAN, ResultBook, Value
from csp_jax.report.series import Key, colour_class, group_of, is_main, label

SPLITS_PER_BLOCK = 3


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
# Differences from the base on the same items, where the run measured them: metric "delta_<metric>".
CHANGE_COLUMNS = (
    Column("delta_auc_correctness", "AUC", 1),
    Column("delta_brier", "Brier", -1),
    Column("delta_ece", "ECE", -1),
    Column("delta_direct_accuracy", "Direct", 1),
)
RATE_COLUMNS = (Column("ties", "Ties", 0), Column("unparsable", "Unparsable", 0))
# Reference rows: the metric that says what the column's figure would be for a model that knows no better.
REFERENCES = (
    ("Null ECE", "ece", "null_ece"),
    ("Best constant Brier", "brier", "best_constant_brier"),
)


@dataclass(frozen=True)
class Cell:
    """One printed figure; `interval` is "" where there is none; `mark`: best, better, worse or ""."""

    text: str
    interval: str = ""
    mark: str = ""


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
    """ ".052–.081" (no leading zeros: it stands small under its figure), or "" where there is no interval."""
    if math.isnan(value.low) or math.isnan(value.high):
        return ""
    return "–".join(re.sub(r"^(-?)0\.", r"\1.", f"{end:.3f}") for end in (value.low, value.high))


def signed(value: Value) -> str:
    """A difference with its sign (none where it prints as zero), "–" where it is undefined."""
    text = number(value.value)
    if text in ("–", "0.000", "-0.000"):
        return text.removeprefix("-")
    return f"{value.value:+.3f}".replace("-", "−")


def signed_interval(value: Value) -> str:
    """ "−.402 to −.361", or "" where there is no interval."""
    return interval(value).replace("–", " to ").replace("-", "−")


MakeCell = Callable[[Key, str, Column], Cell]


def blocks(book: ResultBook, keys: list[Key], columns: Sequence[Column], references: bool) -> list[Block]:
    """The table of `keys` × (splits × columns), in blocks of three splits, the mean over splits last."""

    def cell(key: Key, split: str, column: Column) -> Cell:
        value = _look_up(book, key, split, column.metric)
        if value is None:
            return Cell("–")
        text = number(value.value)
        return Cell(text, interval(value), "best" if text == _best(book, keys, split, column) else "")

    made = [_block(book, keys, part, columns, cell) for part in _parts(book)]
    if references:
        for block in made:
            splits = [split for split, _ in block.heads]
            lines = [_reference(book, keys, splits, columns, *which) for which in REFERENCES if book.has(which[2])]
            block.groups.extend([Group("For reference", lines)] if lines else [])
    return made


def change_blocks(book: ResultBook) -> list[Block]:
    """Differences from the base with their intervals; marked where the interval excludes no change."""
    columns = [column for column in CHANGE_COLUMNS if book.has(column.metric)]
    keys = [key for key in book.keys if any(book.cell(key, s, c.metric) for s in book.splits for c in columns)]

    def cell(key: Key, split: str, column: Column) -> Cell:
        value = _look_up(book, key, split, column.metric)
        if value is None:
            return Cell("–")
        ends = sorted((column.better * value.low, column.better * value.high))
        mark = "better" if ends[0] > 0 else ("worse" if ends[1] < 0 else "")
        return Cell(signed(value), signed_interval(value), mark)

    return [_block(book, keys, part, columns, cell) for part in _parts(book)] if keys else []


def _parts(book: ResultBook) -> list[list[str]]:
    splits = [*book.splits, MEAN] if len(book.splits) > 1 else book.splits
    return [splits[start : start + SPLITS_PER_BLOCK] for start in range(0, len(splits), SPLITS_PER_BLOCK)]


def _look_up(book: ResultBook, key: Key, split: str, metric: str) -> Value | None:
    return book.mean(key, metric) if split == MEAN else book.cell(key, split, metric)


def _block(book: ResultBook, keys: list[Key], splits: list[str], columns: Sequence[Column], make: MakeCell) -> Block:
    groups: list[Group] = []
    for key in keys:
        line = Line(
            name=label(key, with_recipe=not is_main(key)),
            colour=colour_class(key),
            cells=[make(key, split, column) for split in splits for column in columns],
        )
        heading = group_of(key)
        if not groups or groups[-1].heading != heading:
            groups.append(Group(heading, []))
        groups[-1].lines.append(line)
    heads = [(split, "" if split == MEAN else book.items(split)) for split in splits]
    return Block(heads, columns, groups)


def _best(book: ResultBook, keys: list[Key], split: str, column: Column) -> str:
    """The column's best figure as printed, "" where fewer than two models have one: equal prints share it."""
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
        return Cell(low) if low == high else Cell("", interval(Value(math.nan, min(values), max(values))))

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
