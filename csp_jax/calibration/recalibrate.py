"""Recalibration baselines fitted on a held-out split: temperature, Platt, isotonic. Host numpy, float64.

Each `fit_*` takes probabilities in [0, 1] and outcomes 0/1 and gives a map of probabilities to probabilities.
Log-odds are taken of probabilities clipped to [LOGIT_CLIP, 1 - LOGIT_CLIP]: half a percent, below what whole
percents can say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy import optimize, special

LOGIT_CLIP = 0.005

Recalibration = Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]]


def log_odds(confidence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Clipped log(p / (1 - p))."""
    return special.logit(np.clip(np.asarray(confidence, np.float64), LOGIT_CLIP, 1 - LOGIT_CLIP))


def _checked(
    confidence: Float[np.ndarray, " n"],
    outcome: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p, y = np.asarray(confidence, np.float64), np.asarray(outcome, np.float64)
    w = np.ones_like(p) if weight is None else np.asarray(weight, np.float64)
    if not p.shape == y.shape == w.shape or p.ndim != 1:
        raise ValueError(f"confidence {p.shape}, outcome {y.shape}, weight {w.shape}: three vectors of one length")
    keep = w > 0
    p, y, w = p[keep], y[keep], w[keep]
    if not p.size:
        raise ValueError("nothing to fit: no example has weight")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(y, (0, 1)).all():
        raise ValueError("confidences must lie in [0, 1] and outcomes be 0 or 1")
    return p, y, w


@dataclass(frozen=True)
class Scaling:
    """sigmoid(slope x log-odds + offset); a temperature T is slope 1/T with offset 0."""

    slope: float
    offset: float = 0.0

    def __call__(self, confidence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return special.expit(self.slope * log_odds(confidence) + self.offset)

    @property
    def temperature(self) -> float:
        return 1 / self.slope


@dataclass(frozen=True)
class Isotonic:
    """Linear between the fitted points, constant beyond them."""

    confidence: Float[np.ndarray, " points"]
    value: Float[np.ndarray, " points"]

    def __call__(self, confidence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.interp(np.asarray(confidence, np.float64), self.confidence, self.value)


def _mean_nll(z: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    return float((weight * (np.logaddexp(0, z) - target * z)).sum() / weight.sum())


def fit_temperature(
    confidence: Float[np.ndarray, " n"],
    outcome: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"] | None = None,
) -> Scaling:
    """The temperature in [exp(-5), exp(5)] of least NLL (Guo et al. 2017, 4.2, here on log-odds).

    Confidences that rank the wrong way round end at the highest temperature: all one half.
    """
    p, y, w = _checked(confidence, outcome, weight)
    z = log_odds(p)
    found = optimize.minimize_scalar(
        lambda log_t: _mean_nll(z * np.exp(-log_t), y, w),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return Scaling(float(np.exp(-found.x)))


def fit_platt(
    confidence: Float[np.ndarray, " n"],
    outcome: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"] | None = None,
) -> Scaling:
    """Logistic regression on the log-odds with Platt's (1999) smoothed targets: separable data have a fit."""
    p, y, w = _checked(confidence, outcome, weight)
    z = log_odds(p)
    positives, negatives = (w * y).sum(), (w * (1 - y)).sum()
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        error = w * (special.expit(ab[0] * z + ab[1]) - target) / w.sum()
        return _mean_nll(ab[0] * z + ab[1], target, w), np.array([(error * z).sum(), error.sum()])

    start = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    return Scaling(float(found.x[0]), float(found.x[1]))


def fit_isotonic(
    confidence: Float[np.ndarray, " n"],
    outcome: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"] | None = None,
) -> Isotonic:
    """The non-decreasing map of least squared error (Zadrozny & Elkan 2002), one value per confidence."""
    p, y, w = _checked(confidence, outcome, weight)
    points, group = np.unique(p, return_inverse=True)
    total = np.bincount(group, w)
    fitted = optimize.isotonic_regression(np.bincount(group, w * y) / total, weights=total)
    return Isotonic(points, fitted.x)


RECALIBRATIONS: dict[str, Callable[..., Recalibration]] = {
    "temperature": fit_temperature,
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}
