"""All scores of (confidence, outcome) pairs as functions of the weights, in the form the bootstrap wants.

A statistic is a callable `(data, weight) -> {name: scalar}` that is jittable and respects weight 0; it is a
frozen dataclass, so that equal ones share a compilation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from csp_jax.calibration import metrics, ranking, smooth
from csp_jax.calibration.binning import Binning, bin_index, percents, probabilities
from csp_jax.calibration.metrics import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """Confidences with their outcomes (1 or 0), their bins already assigned on the host."""

    probability: Float[jax.Array, " n"]
    percent: Float[jax.Array, " n"]
    index: Int[jax.Array, " n"]
    outcome: Float[jax.Array, " n"]


def make_pairs(
    confidence: Shaped[np.ndarray, " n"], outcome: Shaped[np.ndarray, " n"], bins: int, binning: Binning
) -> Pairs:
    """Pairs from host arrays: integer `confidence` = whole percents, floating = probabilities in [0, 1]."""
    return Pairs(
        probabilities(confidence),
        percents(confidence),
        jnp.asarray(bin_index(confidence, bins, binning), jnp.int32),
        jnp.asarray(outcome, jnp.float32),
    )


def calibration_scores(pairs: Pairs, weight: Float[Array, " n"], rows: int, bins: int) -> dict[str, jax.Array]:
    """ECE and its relatives, Brier and its split, NLL; `rows` bins in the sums, `bins` of equal mass."""
    weight = metrics.weights(weight, pairs.probability)
    binned = metrics.sums_at(pairs.index, pairs.percent, pairs.outcome, weight, rows)
    totals = metrics.score_sums(pairs.probability, pairs.outcome, weight)
    split = metrics.brier_split(binned, totals)
    return {
        "mean_confidence": metrics.mean_confidence(totals),
        "ece": metrics.ece(binned),
        "mce": metrics.mce(binned),
        "debiased_ece": metrics.debiased_ece(binned),
        "adaptive_ece": smooth.equal_mass_ece(pairs.probability, pairs.outcome, weight, bins=bins),
        "smooth_ece": smooth.smooth_ece(pairs.probability, pairs.outcome, weight),
        "brier": metrics.brier(totals),
        "brier_reliability": split.reliability,
        "brier_resolution": split.resolution,
        "brier_uncertainty": split.uncertainty,
        "brier_refinement": split.refinement,
        "brier_within_bin": split.within_bin,
        "nll": metrics.nll(totals),
    }


def selection_scores(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"],
    groups: ranking.TieGroups,
) -> dict[str, jax.Array]:
    """How well confidences choose the answers to give: risk, coverage, rank correlation with being right."""
    curve = ranking.risk_coverage(confidence, correct, weight, groups)
    correlation = ranking.outcome_correlation(confidence, correct, weight, groups)
    return {
        "aurc": ranking.aurc(curve),
        "eaurc": ranking.excess_aurc(curve),
        "augrc": ranking.augrc(curve),
        "risk_at_80_coverage": ranking.risk_at_coverage(curve, 0.8),
        "coverage_at_5_risk": ranking.coverage_at_risk(curve, 0.05),
        "spearman": correlation.spearman,
        "kendall_tau_b": correlation.kendall_tau_b,
    }


@dataclass(frozen=True)
class PairScores:
    """The statistic of (confidence, right or wrong) answers; `rows` as `bin_count(bins, binning)` says."""

    bins: int = 10
    rows: int = 10

    def __call__(self, pairs: Pairs, weight: Float[Array, " n"]) -> dict[str, jax.Array]:
        order = (pairs.percent, pairs.outcome, weight, ranking.tie_groups(pairs.percent))
        return {
            "accuracy": metrics.accuracy(metrics.score_sums(pairs.probability, pairs.outcome, weight)),
            **calibration_scores(pairs, weight, self.rows, self.bins),
            "auroc": ranking.auroc(*order),
            "auprc": ranking.average_precision(*order),
            **selection_scores(*order),
        }
