"""The points of reliability diagrams and ROC curves, from saved confidences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The 97.5% point of the standard normal distribution: two-sided 95% intervals.
NORMAL_975 = 1.959963984540054
# Verbalized percents sit on bin edges; edges are compared with this slack so that 0.3 in float32 is 30%.
EDGE_SLACK = 1e-6


@dataclass(frozen=True)
class Forecasts:
    """Probabilities [m] and outcomes [m] (0/1) of one split, and how many items had no readable confidence."""

    probability: np.ndarray
    outcome: np.ndarray
    unparsable: int


def forecasts(confidence: np.ndarray, truth: np.ndarray, preset: str) -> Forecasts:
    """What the reliability diagram is drawn from.

    `csp-classwise`: p = c(yes) against [truth is yes]. Every other preset: p = c(ŷ), the higher of the two
    confidences, against [ŷ is right] (a tie is wrong). Unreadable items (nan) are left out and counted.
    """
    if preset == "csp-classwise":
        probability, outcome = confidence[:, 0], truth == 0
    else:
        probability, outcome = top_confidence(confidence), answered_right(confidence, truth)
    readable = ~np.isnan(probability)
    return Forecasts(probability[readable], outcome[readable].astype(np.int64), int((~readable).sum()))


def top_confidence(confidence: np.ndarray) -> np.ndarray:
    """c(ŷ) [m]: the higher of the two confidences; nan where either could not be read."""
    return confidence.max(axis=1)


def answered_right(confidence: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether the candidate with the higher confidence is the right one [m]; ties and unreadable are wrong."""
    right = np.take_along_axis(confidence, truth[:, None], axis=1)[:, 0]
    wrong = np.take_along_axis(confidence, 1 - truth[:, None], axis=1)[:, 0]
    return right > wrong


@dataclass(frozen=True)
class Reliability:
    """K equal-width bins of [0, 1], right-closed with 0 in the first; nan where a bin is empty.

    `count` [K] items; `probability` [K] mean forecast; `frequency` [K] share of outcomes that are 1;
    `low`, `high` [K] Wilson's 95% interval of `frequency` (items taken as independent).
    """

    count: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def ece(self) -> float:
        """Expected calibration error of these bins: Σ |B|/N · |frequency - probability|; nan without items."""
        total = self.count.sum()
        gap = np.abs(self.frequency - self.probability)
        return float(np.nansum(self.count * gap) / total) if total else float("nan")


def reliability(probability: np.ndarray, outcome: np.ndarray, bins: int) -> Reliability:
    """The reliability diagram of forecasts [m] in [0, 1] against outcomes [m] in {0, 1}."""
    index = np.clip(np.ceil(probability * bins - EDGE_SLACK) - 1, 0, bins - 1).astype(np.int64)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, weights=probability, minlength=bins) / count
        frequency = np.bincount(index, weights=outcome, minlength=bins) / count
    low, high = wilson(frequency, count)
    return Reliability(count, mean, frequency, low, high)


def wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% score interval of a binomial share with `count` trials; nan where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = 1 + NORMAL_975**2 / count
        centre = (share + NORMAL_975**2 / (2 * count)) / scale
        spread = np.sqrt(share * (1 - share) / count + NORMAL_975**2 / (4 * count**2)) * NORMAL_975 / scale
        return np.clip(centre - spread, 0, 1), np.clip(centre + spread, 0, 1)


@dataclass(frozen=True)
class Roc:
    """An ROC curve: false and true positive rates from (0, 0) to (1, 1), and the area (ties count 1/2)."""

    false_positive: np.ndarray
    true_positive: np.ndarray

    def area(self) -> float:
        return float(np.trapezoid(self.true_positive, self.false_positive))


def roc(score: np.ndarray, positive: np.ndarray) -> Roc | None:
    """The ROC curve of scores [m] for labels [m] (0/1); equal scores are one step. None if one class is absent."""
    positives, negatives = int((positive == 1).sum()), int((positive == 0).sum())
    if not positives or not negatives:
        return None
    order = np.argsort(-score, kind="stable")
    ranked, label = score[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true = np.cumsum(label)[last_of_tie]
    false = last_of_tie + 1 - true
    return Roc(np.append(0.0, false / negatives), np.append(0.0, true / positives))
