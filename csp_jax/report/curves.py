"""The points of reliability diagrams and ROC curves, from saved predictions and the package's own metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csp_jax.calibration.binning import bin_count
from csp_jax.calibration.metrics import BinSums, ece, reliability_curve, sums_at, weights
from csp_jax.calibration.presets import PRESETS, Sweep, make_sweep
from csp_jax.report.predictions import Predictions


@dataclass(frozen=True)
class Reliability:
    """The bins of one split, host arrays [K]; nan where a bin is empty.

    `count` items, `probability` mean forecast, `frequency` share of outcomes that are 1, `low` and `high` its
    Wilson interval; `ece` of the whole.
    """

    count: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ece: float


def sweep_of(predictions: Predictions, split: str, preset: str, bins: int) -> Sweep | None:
    """One split's items under a preset's conventions; None where the split has none."""
    confidence, truth = predictions.of_split(split)
    return make_sweep(confidence, truth, preset=preset, bins=bins) if len(truth) else None


def reliability(predictions: Predictions, split: str, preset: str, bins: int) -> Reliability:
    """The reliability diagram of one split, in the bins that the preset names."""
    binning = PRESETS[preset].binning
    sweep = sweep_of(predictions, split, preset, bins)
    if sweep is None:
        sums = BinSums.zeros(bins, binning)
    else:
        pairs, rows = sweep.pairs, bin_count(bins, binning)
        ones = weights(None, pairs.probability)
        sums = sums_at(pairs.index, pairs.percent, pairs.outcome, ones, rows)
    curve = [np.asarray(part, np.float64) for part in reliability_curve(sums)]
    probability, frequency, count, low, high = curve
    return Reliability(
        count.astype(np.int64), probability, frequency, low.clip(0, 1), high.clip(0, 1), float(ece(sums))
    )


@dataclass(frozen=True)
class Roc:
    """An ROC curve: false and true positive rates from (0, 0) to (1, 1)."""

    false_positive: np.ndarray
    true_positive: np.ndarray

    def area(self) -> float:
        """The area under the drawn line: the AUROC with ties counted one half."""
        return float(np.trapezoid(self.true_positive, self.false_positive))


def roc(score: np.ndarray, positive: np.ndarray) -> Roc | None:
    """The ROC curve of scores [m] for labels [m] (0/1), equal scores one step; None if a class is absent."""
    positives, negatives = int((positive == 1).sum()), int((positive == 0).sum())
    if not positives or not negatives:
        return None
    order = np.argsort(-score, kind="stable")
    ranked, label = score[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true = np.cumsum(label)[last_of_tie]
    false = last_of_tie + 1 - true
    return Roc(np.append(0.0, false / negatives), np.append(0.0, true / positives))


def split_roc(predictions: Predictions, split: str, classwise: bool) -> Roc | None:
    """The ROC curve of one split: yes against no by c(yes), or right against wrong by c(ŷ)."""
    sweep = sweep_of(predictions, split, "csp-classwise", 1)
    if sweep is None:
        return None
    score, positive = (sweep.positive, sweep.actual) if classwise else (sweep.top, sweep.right)
    return roc(np.asarray(score), np.asarray(positive).astype(np.int64))
