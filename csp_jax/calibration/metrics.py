"""Calibration metrics as mergeable sums on the device: ECE, MCE, reliability curve, Brier and its split, NLL.

Sums add up (`+`, `psum`) over batches, devices and hosts in any order; scores are read from the sums once
at the end. Every example has a weight: 0 is padding (whatever stands in it), 1 an example, a whole number a
count. Outcomes are 1 (right, or: the class is present) and 0. All arithmetic is float32; sums of counts and
of whole percents are exact up to 2**24. Scores of nothing (no weight at all) are nan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Float, Int, Shaped

from csp_jax.calibration.binning import Binning, bin_count, bin_index, percents, probabilities

NLL_CLIP = 1e-6

Array = jax.Array | np.ndarray
Sums = TypeVar("Sums", bound="BinSums | ScoreSums")


def ratio(numerator: jax.Array, denominator: jax.Array, empty: float = float("nan")) -> jax.Array:
    """Quotient; `empty` where the denominator is 0."""
    return jnp.where(denominator != 0, numerator / jnp.where(denominator != 0, denominator, 1), empty)


def weights(weight: Float[Array, " n"] | None, like: Shaped[Array, " n"]) -> Float[jax.Array, " n"]:
    """The weights as float32; ones if there are none."""
    return jnp.ones(like.shape, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)


def masked(values: Float[Array, " n"], weight: Float[jax.Array, " n"]) -> Float[jax.Array, " n"]:
    """Float32 values with 0 in padding, where anything, nan included, may stand."""
    return jnp.where(weight > 0, jnp.asarray(values, jnp.float32), 0)


def _add(first: Sums, second: Sums) -> Sums:
    return jax.tree.map(jnp.add, first, second)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BinSums:
    """Per bin: weight, weighted confidence **in percent**, weighted outcome.

    Percents, because sums of whole ones are exact.
    """

    weight: Float[jax.Array, " bins"]
    confidence: Float[jax.Array, " bins"]
    correct: Float[jax.Array, " bins"]

    @classmethod
    def zeros(cls, bins: int = 10, binning: Binning = "right_closed") -> BinSums:
        """The sums of nothing."""
        empty = jnp.zeros(bin_count(bins, binning), jnp.float32)
        return cls(empty, empty, empty)

    def __add__(self, other: BinSums) -> BinSums:
        return _add(self, other)

    def psum(self, axis_name: str | tuple[str, ...]) -> BinSums:
        """The sums over a mesh axis, inside shard_map or pmap."""
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis_name), self)

    def update(
        self,
        confidence: Shaped[Array, " n"],
        correct: Shaped[Array, " n"],
        weight: Float[Array, " n"] | None = None,
        binning: Binning = "right_closed",
    ) -> BinSums:
        """These sums and those of one more batch."""
        bins = self.weight.shape[0] - bin_count(0, binning)
        return self + bin_sums(confidence, correct, weight, bins=bins, binning=binning)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreSums:
    """Weighted sums over examples: 1, outcome, probability, squared error, negative log-likelihood (nats)."""

    weight: Float[jax.Array, ""]
    correct: Float[jax.Array, ""]
    confidence: Float[jax.Array, ""]
    squared: Float[jax.Array, ""]
    nll: Float[jax.Array, ""]

    def __add__(self, other: ScoreSums) -> ScoreSums:
        return _add(self, other)

    def psum(self, axis_name: str | tuple[str, ...]) -> ScoreSums:
        """The sums over a mesh axis, inside shard_map or pmap."""
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis_name), self)


def sums_at(
    index: Int[Array, " n"],
    percent: Float[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[jax.Array, " n"],
    rows: int,
) -> BinSums:
    """BinSums of examples whose bins are known (`index` in [0, rows)); `percent` in [0, 100]."""
    member = (jnp.asarray(index)[:, None] == jnp.arange(rows)).astype(jnp.float32)
    columns = [jnp.ones_like(weight), masked(percent, weight), masked(correct, weight)]
    # A matrix product in full float32: whole numbers stay exact, and many weightings at once are one product.
    totals = [jnp.matmul(weight * column, member, precision="highest") for column in columns]
    return BinSums(*totals)


def bin_sums(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    *,
    bins: int = 10,
    binning: Binning = "right_closed",
) -> BinSums:
    """Sums per equal-width bin; integer `confidence` = whole percents, floating = probabilities."""
    index = bin_index(confidence, bins, binning)
    return sums_at(index, percents(confidence), correct, weights(weight, confidence), bin_count(bins, binning))


def score_sums(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    *,
    clip: float = NLL_CLIP,
) -> ScoreSums:
    """Sums for Brier, NLL, accuracy and mean confidence.

    The NLL uses max(p, clip) for outcome 1 and max(1 - p, clip) for outcome 0: a sure and wrong answer costs
    -log(clip), and 13.8 nats by default.
    """
    weight = weights(weight, confidence)
    probability, outcome = masked(probabilities(confidence), weight), masked(correct, weight)
    yes, no = jnp.log(jnp.maximum(probability, clip)), jnp.log(jnp.maximum(1 - probability, clip))
    terms = (
        jnp.ones_like(weight),
        outcome,
        probability,
        (probability - outcome) ** 2,
        -outcome * yes - (1 - outcome) * no,
    )
    return ScoreSums(*(jnp.vdot(weight, term, precision="highest") for term in terms))


def _gap(sums: BinSums) -> Float[jax.Array, " bins"]:
    """Weight times |mean confidence - mean outcome| of each bin, in [0, weight]."""
    return jnp.abs(sums.confidence - 100 * sums.correct) / 100


def ece(sums: BinSums) -> Float[jax.Array, ""]:
    """Expected calibration error (Guo et al. 2017, eq. 3), in [0, 1].

    The sum over bins of the share of the weight times |accuracy - mean confidence|.
    """
    return ratio(_gap(sums).sum(), sums.weight.sum())


def mce(sums: BinSums) -> Float[jax.Array, ""]:
    """Maximum calibration error over the bins that are not empty (Guo et al. 2017, eq. 5)."""
    largest = ratio(_gap(sums), sums.weight, 0.0).max()
    return jnp.where(sums.weight.sum() > 0, largest, jnp.nan)


def average_calibration_error(sums: BinSums) -> Float[jax.Array, ""]:
    """The plain mean of the gaps of the bins that are not empty (netcal's ACE)."""
    return ratio(ratio(_gap(sums), sums.weight, 0.0).sum(), (sums.weight > 0).sum())


def root_mean_squared_ce(sums: BinSums) -> Float[jax.Array, ""]:
    """Root of the weighted mean squared gap (torchmetrics' norm l2)."""
    return jnp.sqrt(ratio((ratio(_gap(sums), sums.weight, 0.0) ** 2 * sums.weight).sum(), sums.weight.sum()))


def debiased_ece(sums: BinSums) -> Float[jax.Array, ""]:
    """ECE less its upward bias at this n, at least 0; weights are counts.

    2 ECE - E[ECE'], where each bin's accuracy is redrawn from N(accuracy, accuracy (1 - accuracy) / count)
    (Kumar, Liang & Ma 2019, section 5, whose resampling is replaced by the mean of the folded normal).
    """
    accuracy = ratio(sums.correct, sums.weight, 0.0)
    gap = ratio(_gap(sums), sums.weight, 0.0)
    deviation = jnp.sqrt(ratio(accuracy * (1 - accuracy), sums.weight, 0.0))
    standardized = ratio(gap, deviation, 0.0)
    folded = 2 * deviation * norm.pdf(standardized) + gap * (1 - 2 * norm.cdf(-standardized))
    expected = (jnp.where(deviation > 0, folded, gap) * sums.weight).sum()
    return jnp.maximum(2 * ece(sums) - ratio(expected, sums.weight.sum()), 0)


def debiased_squared_ce(sums: BinSums) -> Float[jax.Array, ""]:
    """Mean squared gap less accuracy (1 - accuracy) / (count - 1); may be negative; weights are counts.

    Kumar, Liang & Ma 2019, definition 5.1. Bins of one example are left as they are.
    """
    accuracy = ratio(sums.correct, sums.weight, 0.0)
    variance = jnp.where(sums.weight > 1, accuracy * (1 - accuracy) / jnp.maximum(sums.weight - 1, 1e-6), 0)
    squared = ratio(_gap(sums), sums.weight, 0.0) ** 2
    return ratio(((squared - variance) * sums.weight).sum(), sums.weight.sum())


class ReliabilityCurve(NamedTuple):
    """Per bin: mean confidence and accuracy in [0, 1] (nan if empty), weight, Wilson band of the accuracy."""

    confidence: Float[jax.Array, " bins"]
    accuracy: Float[jax.Array, " bins"]
    weight: Float[jax.Array, " bins"]
    low: Float[jax.Array, " bins"]
    high: Float[jax.Array, " bins"]


def reliability_curve(sums: BinSums, level: float = 0.95) -> ReliabilityCurve:
    """The reliability diagram: each bin's point and its accuracy's Wilson interval (weights are counts)."""
    confidence = ratio(sums.confidence, sums.weight) / 100
    accuracy = ratio(sums.correct, sums.weight)
    z = norm.ppf(0.5 + level / 2)
    count = jnp.where(sums.weight > 0, sums.weight, jnp.nan)
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count) * jnp.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2)
    return ReliabilityCurve(confidence, accuracy, sums.weight, centre - spread, centre + spread)


def accuracy(scores: ScoreSums) -> Float[jax.Array, ""]:
    """Weighted mean outcome."""
    return ratio(scores.correct, scores.weight)


def mean_confidence(scores: ScoreSums) -> Float[jax.Array, ""]:
    """Weighted mean probability."""
    return ratio(scores.confidence, scores.weight)


def brier(scores: ScoreSums) -> Float[jax.Array, ""]:
    """Weighted mean of (probability - outcome) squared (Brier 1950, one class)."""
    return ratio(scores.squared, scores.weight)


def nll(scores: ScoreSums) -> Float[jax.Array, ""]:
    """Weighted mean negative log-likelihood in nats, clipped as `score_sums` says."""
    return ratio(scores.nll, scores.weight)


class BrierSplit(NamedTuple):
    """brier = reliability - resolution + uncertainty + within_bin = reliability + refinement + within_bin."""

    reliability: Float[jax.Array, ""]
    resolution: Float[jax.Array, ""]
    uncertainty: Float[jax.Array, ""]
    refinement: Float[jax.Array, ""]
    within_bin: Float[jax.Array, ""]


def brier_split(bins: BinSums, scores: ScoreSums) -> BrierSplit:
    """Murphy's (1973) split of the Brier score over bins; reliability is also called calibration.

    `within_bin` is what bins that mix several confidences leave over (Stephenson et al. 2008); it is 0 when
    all confidences of a bin are equal (for whole percents: `sums_at(percent, percent, correct, weight,
    rows=101)`).
    """
    base = ratio(bins.correct.sum(), bins.weight.sum())
    total = bins.weight.sum()
    observed = ratio(bins.correct, bins.weight, 0.0)
    reliability = ratio((ratio(_gap(bins), bins.weight, 0.0) ** 2 * bins.weight).sum(), total)
    resolution = ratio(((observed - base) ** 2 * bins.weight).sum(), total)
    uncertainty = base * (1 - base)
    refinement = uncertainty - resolution
    return BrierSplit(reliability, resolution, uncertainty, refinement, brier(scores) - reliability - refinement)


def best_constant_brier(outcomes: Shaped[Array, " n"], weight: Float[Array, " n"] | None = None) -> jax.Array:
    """The Brier score of always saying the base rate p: p (1 - p)."""
    weight = weights(weight, outcomes)
    base = ratio(jnp.vdot(weight, masked(outcomes, weight), precision="highest"), weight.sum())
    return base * (1 - base)


class Detection(NamedTuple):
    """Precision, recall, F1 of the positive class and the share predicted positive, all in [0, 1]."""

    precision: Float[jax.Array, ""]
    recall: Float[jax.Array, ""]
    f1: Float[jax.Array, ""]
    predicted_rate: Float[jax.Array, ""]


def precision_recall_f1(
    predicted: Shaped[Array, " n"], actual: Shaped[Array, " n"], weight: Float[Array, " n"] | None = None
) -> Detection:
    """Scores of the positive class (1 in both arrays); 0 if none is predicted or present, as in sklearn."""
    weight = weights(weight, predicted)
    said, true = masked(predicted, weight), masked(actual, weight)
    hits, said_total, true_total = (jnp.vdot(weight, term, precision="highest") for term in (said * true, said, true))
    return Detection(
        ratio(hits, said_total, 0.0),
        ratio(hits, true_total, 0.0),
        ratio(2 * hits, said_total + true_total, 0.0),
        ratio(said_total, weight.sum()),
    )


def merge(parts: list[Sums]) -> Sums:
    """All sums of a list (at least one) added up."""
    return reduce(_add, parts)
