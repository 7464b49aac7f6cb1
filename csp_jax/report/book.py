"""Results looked up by model, split and metric, with repeats over seeds brought together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from csp_jax.report.inputs import ResultRow
from csp_jax.report.series import Key, ordered, ordered_splits

MEAN = "mean"


@dataclass(frozen=True)
class Value:
    """A figure with its interval (nan = there is none) and the number of items behind it."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    seeds: int = 1


class ResultBook:
    """The rows of results.json by (model, split, metric)."""

    def __init__(self, rows: Iterable[ResultRow]):
        self.rows = list(rows)
        self._cells: dict[tuple[Key, str, str], list[ResultRow]] = {}
        for row in self.rows:
            self._cells.setdefault((row.key, row.split, row.metric), []).append(row)
        self.keys = ordered(row.key for row in self.rows)
        self.splits = ordered_splits(row.split for row in self.rows if row.split != MEAN)
        self.seeds = sorted({row.seed for row in self.rows if row.seed is not None})

    def cell(self, key: Key, split: str, metric: str) -> Value | None:
        """One figure. Several rows: a row without a seed wins (its writer pooled the seeds), else the mean of
        the seeds with the widest interval that their intervals span."""
        rows = self._cells.get((key, split, metric), [])
        pooled = [row for row in rows if row.seed is None]
        rows = pooled[-1:] or rows
        if not rows:
            return None
        return Value(
            value=math.fsum(row.value for row in rows) / len(rows),
            low=_extreme(min, [row.low for row in rows]),
            high=_extreme(max, [row.high for row in rows]),
            n=rows[0].n,
            seeds=len(rows),
        )

    def mean(self, key: Key, metric: str) -> Value | None:
        """The mean over the splits, None unless every split has a value.

        The run's own (a row of split "mean", with its interval) comes before the plain mean of the values.
        """
        cells = [self.cell(key, split, metric) for split in self.splits]
        values = [cell.value for cell in cells if cell is not None and not math.isnan(cell.value)]
        if len(values) < len(self.splits):
            return None
        return self.cell(key, MEAN, metric) or Value(math.fsum(values) / len(values))

    def shares(self, metrics: Iterable[str]) -> ResultBook:
        """The rows of counting metrics, as shares of their n items."""
        counting = frozenset(metrics)
        chosen = [row for row in self.rows if row.metric in counting and row.n]
        return ResultBook(replace(row, value=row.value / row.n, low=math.nan, high=math.nan) for row in chosen)

    def items(self, split: str) -> str:
        """How many items the split's figures rest on, e.g. "600" or "598–600"."""
        counts = sorted({row.n for row in self.rows if row.split == split})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"

    def spans_seeds(self) -> bool:
        """Whether any figure is a mean over seeds made here, not by the run itself."""
        return any(len(rows) > 1 and all(row.seed is not None for row in rows) for rows in self._cells.values())

    def largest(self, metric: str) -> float:
        """The largest value of a metric in any row; nan where there is none."""
        values = [row.value for row in self.rows if row.metric == metric and not math.isnan(row.value)]
        return max(values, default=math.nan)

    def has(self, metric: str) -> bool:
        return any(row.metric == metric for row in self.rows)


def _extreme(choose: Callable[[list[float]], float], ends: list[float]) -> float:
    """The outermost end of several intervals; nan if one of them has none, whatever the order."""
    return math.nan if any(math.isnan(end) for end in ends) else choose(ends)
