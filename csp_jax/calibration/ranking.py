"""Metrics of the order of confidences, over gathered arrays: AUROC, AUPRC, risk-coverage, rank correlations.

All are jittable, all treat tied confidences as tied (no result depends on the order of the rows), and all
take weights: 0 is padding, 1 an example, a whole number a count. Only the weights need change between
bootstrap resamples: the sorting then happens once (`groups` shares it among metrics). Only the order of
scores matters. Undefined values (one class only, constant scores, no weight) are nan.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from csp_jax.calibration.metrics import Array, masked, ratio, weights


class TieGroups(NamedTuple):
    """Where each example's group of equal scores lies: positions [start, end) of the ascending `order`."""

    order: Int[jax.Array, " n"]
    start: Int[jax.Array, " n"]
    end: Int[jax.Array, " n"]


def tie_groups(score: Shaped[Array, " n"]) -> TieGroups:
    """Sorts once; nan (padding) comes last."""
    score = jnp.asarray(score)
    order = jnp.argsort(score)
    ascending = score[order]
    return TieGroups(
        order,
        jnp.searchsorted(ascending, score, side="left"),
        jnp.searchsorted(ascending, score, side="right"),
    )


def running_sum(values: Float[jax.Array, " n"], groups: TieGroups) -> Float[jax.Array, " n+1"]:
    """Sums of the values of the first 0, 1, ..., n examples in ascending order."""
    return jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(values[groups.order])])


def auroc(
    score: Shaped[Array, " n"],
    outcome: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    groups: TieGroups | None = None,
) -> Float[jax.Array, ""]:
    """P(score of a positive > score of a negative), ties one half (Mann-Whitney U / (positives x negatives)).

    With outcome = right and score = c(y_hat) it is `auc_correctness`; with outcome = [truth is yes] and
    score = c("yes") it is `auc_classwise`.
    """
    weight, groups = weights(weight, score), groups or tie_groups(score)
    positive = masked(outcome, weight) * weight
    negative = weight - positive
    below = running_sum(ratio(negative, negative.sum()), groups)
    return (ratio(positive, positive.sum()) * 0.5 * (below[groups.start] + below[groups.end])).sum()


def average_precision(
    score: Shaped[Array, " n"],
    outcome: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    groups: TieGroups | None = None,
) -> Float[jax.Array, ""]:
    """AUPRC as the sum over thresholds of (recall gained) x precision (sklearn's average_precision_score)."""
    weight, groups = weights(weight, score), groups or tie_groups(score)
    positive = masked(outcome, weight) * weight
    hits, everything = running_sum(positive, groups), running_sum(weight, groups)
    precision = ratio(hits[-1] - hits[groups.start], everything[-1] - everything[groups.start], 0.0)
    return (ratio(positive, positive.sum()) * precision).sum()


class RiskCoverage(NamedTuple):
    """Per example, the group of its confidence when the surest are answered first.

    Weight answered and errors made before the group and with it (ties share errors evenly), the example's
    share of its group, and the totals.
    """

    before: Float[jax.Array, " n"]
    after: Float[jax.Array, " n"]
    errors_before: Float[jax.Array, " n"]
    errors_after: Float[jax.Array, " n"]
    share: Float[jax.Array, " n"]
    total: Float[jax.Array, ""]
    errors: Float[jax.Array, ""]


def risk_coverage(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    groups: TieGroups | None = None,
) -> RiskCoverage:
    """The risk-coverage curve of answering only the surest (El-Yaniv & Wiener 2010); weights are counts."""
    weight, groups = weights(weight, confidence), groups or tie_groups(confidence)
    answered = running_sum(weight, groups)
    errors = running_sum((1 - masked(correct, weight)) * weight, groups)
    before, after = answered[-1] - answered[groups.end], answered[-1] - answered[groups.start]
    return RiskCoverage(
        before,
        after,
        errors[-1] - errors[groups.end],
        errors[-1] - errors[groups.start],
        ratio(weight, after - before, 0.0),
        answered[-1],
        errors[-1],
    )


def _harmonic_difference(low: Float[jax.Array, ...], high: Float[jax.Array, ...]) -> Float[jax.Array, ...]:
    """1/(low + 1) + ... + 1/high without cancellation, for 0 <= low <= high (also between whole numbers)."""
    span = high - low
    head = sum(span / ((low + j) * (high + j)) for j in range(1, 7))
    a, b = low + 6.5, high + 6.5
    return head + jnp.log1p(span / a) + (1 / b**2 - 1 / a**2) / 24


def aurc(curve: RiskCoverage) -> Float[jax.Array, ""]:
    """Area under the risk-coverage curve: mean over i of the risk of the i surest (Geifman & El-Yaniv 2017).

    Among ties the errors are spread evenly (the expectation over random orders).
    """
    span = curve.after - curve.before
    rate = ratio(curve.errors_after - curve.errors_before, span, 0.0)
    area = (curve.errors_before - rate * curve.before) * _harmonic_difference(curve.before, curve.after)
    return ratio((curve.share * (area + rate * span)).sum(), curve.total)


def excess_aurc(curve: RiskCoverage) -> Float[jax.Array, ""]:
    """AURC less that of the best order of as many errors (Geifman et al. 2019; exact, not in the limit)."""
    right = curve.total - curve.errors
    best = curve.errors - right * _harmonic_difference(right, curve.total)
    return aurc(curve) - ratio(best, curve.total)


def augrc(curve: RiskCoverage) -> Float[jax.Array, ""]:
    """Area under the generalized risk-coverage curve, errors / n against coverage (Traub et al. 2024).

    Equal to (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 at accuracy a.
    """
    middle = 0.5 * (curve.errors_before + curve.errors_after) * (curve.after - curve.before)
    return ratio((curve.share * middle).sum(), curve.total**2)


def risk_at_coverage(curve: RiskCoverage, coverage: float) -> Float[jax.Array, ""]:
    """Error rate of the surest `coverage` (in (0, 1]) of all answers; ties at the border by expectation."""
    target = coverage * curve.total
    span = curve.after - curve.before
    inside = (curve.before < target) & (target <= curve.after * (1 + 1e-6)) & (span > 0)
    part = ratio(target - curve.before, span, 0.0)
    errors = curve.errors_before + jnp.minimum(part, 1) * (curve.errors_after - curve.errors_before)
    return ratio(jnp.where(inside, errors, -1).max(), target)


def accuracy_at_coverage(curve: RiskCoverage, coverage: float) -> Float[jax.Array, ""]:
    """Accuracy of the surest `coverage` of all answers."""
    return 1 - risk_at_coverage(curve, coverage)


def coverage_at_risk(curve: RiskCoverage, risk: float) -> Float[jax.Array, ""]:
    """The largest share that a threshold can answer with an error rate of at most `risk`; 0 if none.

    A threshold cannot split ties.
    """
    allowed = curve.errors_after <= (risk + 1e-6) * curve.after
    return ratio(jnp.where(allowed, curve.after, 0).max(), curve.total)


def spearman(
    x: Shaped[Array, " n"], y: Shaped[Array, " n"], weight: Float[Array, " n"] | None = None
) -> Float[jax.Array, ""]:
    """Spearman's rank correlation with mid-ranks for ties, in [-1, 1]."""
    weight = weights(weight, x)
    share = ratio(weight, weight.sum())

    def centred_rank(score: Shaped[Array, " n"]) -> Float[jax.Array, " n"]:
        groups = tie_groups(score)
        running = running_sum(share, groups)
        return 0.5 * (running[groups.start] + running[groups.end] - 1)

    rank_x, rank_y = centred_rank(x), centred_rank(y)
    square_x, square_y = (share * rank_x**2).sum(), (share * rank_y**2).sum()
    # Rounding leaves a constant's ranks at about 1e-8, not at 0.
    defined = (square_x > 1e-9) & (square_y > 1e-9)
    return jnp.where(defined, (share * rank_x * rank_y).sum() / jnp.sqrt(square_x * square_y), jnp.nan)


def _tied_pairs(share: Float[jax.Array, " n"], groups: TieGroups) -> Float[jax.Array, ""]:
    """Sum over tie groups of the group's share squared."""
    running = running_sum(share, groups)
    return (share * (running[groups.end] - running[groups.start])).sum()


class OutcomeCorrelation(NamedTuple):
    """Rank correlations of a score with a 0/1 outcome, in [-1, 1]."""

    spearman: Float[jax.Array, ""]
    kendall_tau_b: Float[jax.Array, ""]


def outcome_correlation(
    score: Shaped[Array, " n"],
    outcome: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    groups: TieGroups | None = None,
) -> OutcomeCorrelation:
    """Spearman and tau-b of a score with a 0/1 outcome from the AUROC A, without a second sort.

    With p, q the shares of the outcomes and t of the tie groups: Spearman = (A - 1/2) sqrt(12 p q / (1 -
    sum t^3)), tau-b = (2 A - 1) sqrt(2 p q / (1 - sum t^2)); equal to `spearman` and `kendall_tau_b`.
    """
    weight, groups = weights(weight, score), groups or tie_groups(score)
    share = ratio(weight, weight.sum())
    running = running_sum(share, groups)
    tied = running[groups.end] - running[groups.start]
    positive = (share * masked(outcome, weight)).sum()
    both = positive * (1 - positive)
    above = auroc(score, outcome, weight, groups) - 0.5
    squares, cubes = 1 - (share * tied).sum(), 1 - (share * tied**2).sum()
    # Rounding leaves a constant's spread at about 1e-7, not at 0.
    constant = squares < 1e-6
    rank, pairs = jnp.sqrt(12 * both / cubes), jnp.sqrt(2 * both / squares)
    return OutcomeCorrelation(
        jnp.where(constant, jnp.nan, above * rank), jnp.where(constant, jnp.nan, 2 * above * pairs)
    )


def _discordant(rank_y: Int[jax.Array, " n"], share: Float[jax.Array, " n"], levels: int) -> Float[jax.Array, ""]:
    """Sum of share_i share_j over pairs i < j with rank_y[i] > rank_y[j], ranks below 2**levels.

    Such a pair first differs at one bit, where i has 1 and j has 0 under equal higher bits; so one stable
    sort and one running sum per bit count every pair once.
    """

    def at_bit(level: int | jax.Array) -> Float[jax.Array, ""]:
        order = jnp.argsort(rank_y >> (level + 1), stable=True)
        high, sorted_share = rank_y[order] >> (level + 1), share[order]
        bit = (rank_y[order] >> level) & 1
        running = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(jnp.where(bit == 1, sorted_share, 0))])
        start = jnp.searchsorted(high, high, side="left")
        return jnp.where(bit == 0, sorted_share * (running[:-1] - running[start]), 0).sum()

    return jax.lax.fori_loop(0, levels, lambda level, total: total + at_bit(level), jnp.float32(0))


def kendall_tau_b(
    x: Shaped[Array, " n"],
    y: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    *,
    distinct: int | None = None,
) -> Float[jax.Array, ""]:
    """Kendall's tau-b in [-1, 1], in O(n log^2 n); `distinct` bounds how many values y has."""
    weight = weights(weight, x)
    x, y = jnp.asarray(x), jnp.asarray(y)
    share = ratio(weight, weight.sum())
    order = jnp.lexsort((y, x))
    ordered = y[jnp.argsort(y)]
    steps = jnp.concatenate([jnp.zeros(1, jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)])
    rank_y = jnp.cumsum(steps)[jnp.searchsorted(ordered, y)]
    levels = max((distinct or x.shape[0]) - 1, 1).bit_length()
    discordant = 2 * _discordant(rank_y[order], share[order], levels)
    groups_x, groups_y = tie_groups(x), tie_groups(y)
    # Ranks of a pair of columns, as one column: (x group, y group) by position.
    both = jnp.stack([groups_x.start[order], groups_y.start[order]])
    changes = jnp.concatenate([jnp.zeros(1, jnp.int32), (both[:, 1:] != both[:, :-1]).any(0).astype(jnp.int32)])
    tied_both = _tied_pairs(share[order], tie_groups(jnp.cumsum(changes)))
    tied_x, tied_y = _tied_pairs(share, groups_x), _tied_pairs(share, groups_y)
    concordant = 1 - tied_x - tied_y + tied_both - discordant
    defined = (1 - tied_x > 1e-6) & (1 - tied_y > 1e-6)
    scale = jnp.sqrt(jnp.where(defined, (1 - tied_x) * (1 - tied_y), 1))
    return jnp.where(defined, (concordant - discordant) / scale, jnp.nan)
