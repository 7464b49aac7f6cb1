"""Ranking metrics against sklearn, scipy, torchmetrics' golden figures and the definitions written out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from csp_jax.calibration import ranking

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
LIBRARIES = json.loads((GOLDEN / "metrics.json").read_text())
INPUTS = np.load(GOLDEN / "metrics_inputs.npz")
CASES = ["beta500", "percent400", "edges20", "two_value", "all_ones", "all_zero", "single"]


SIZE = 512


def padded(values):
    """Up to SIZE rows, the rest nan: one compilation for every n, and padding is proved on the way."""
    return np.pad(np.asarray(values, np.float32), (0, SIZE - len(values)), constant_values=np.nan)


def padded_weight(weight):
    return np.pad(np.asarray(weight, np.float32), (0, SIZE - len(weight)))


@jax.jit
def everything(score, outcome, other, weight):
    curve = ranking.risk_coverage(score, outcome, weight)
    closed = ranking.outcome_correlation(score, outcome, weight)
    return {
        "auroc": ranking.auroc(score, outcome, weight),
        "average_precision": ranking.average_precision(score, outcome, weight),
        "spearman": ranking.spearman(score, other, weight),
        "kendall": ranking.kendall_tau_b(score, other, weight),
        "outcome_spearman": ranking.spearman(score, outcome, weight),
        "outcome_kendall": ranking.kendall_tau_b(score, outcome, weight, distinct=2),
        "closed_spearman": closed.spearman,
        "closed_kendall": closed.kendall_tau_b,
        "aurc": ranking.aurc(curve),
        "eaurc": ranking.excess_aurc(curve),
        "augrc": ranking.augrc(curve),
        "risk_at_80": ranking.risk_at_coverage(curve, 0.8),
        "accuracy_at_80": ranking.accuracy_at_coverage(curve, 0.8),
        "coverage_at_5": ranking.coverage_at_risk(curve, 0.05),
        "coverage_at_30": ranking.coverage_at_risk(curve, 0.3),
    }


def measure(score, outcome, other=None, weight=None):
    columns = [padded(column) for column in (score, outcome, score if other is None else other)]
    weight = np.ones(len(score)) if weight is None else weight
    found = everything(*columns, padded_weight(weight))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    p, y = INPUTS[f"{name}_p"], INPUTS[f"{name}_y"]
    golden = LIBRARIES[name]["scalar"]
    found = measure(p, y, y)
    rho, tau = golden["spearman_scipy"][0], golden["kendall_b_scipy"][0]
    assert found["auroc"] == pytest.approx(golden["auroc_sklearn"], abs=1e-5, nan_ok=True)
    assert found["average_precision"] == pytest.approx(golden["ap_sklearn"], abs=1e-5)
    for name in ("spearman", "outcome_spearman", "closed_spearman"):
        assert found[name] == pytest.approx(rho, abs=1e-5, nan_ok=True)
    for name in ("kendall", "outcome_kendall", "closed_kendall"):
        assert found[name] == pytest.approx(tau, abs=1e-5, nan_ok=True)


def test_golden_ranks_with_ties_in_both():
    a, b, golden = INPUTS["rank_a"], INPUTS["rank_b"], LIBRARIES["rank"]
    assert float(ranking.spearman(a, b)) == pytest.approx(golden["spearman"][0], abs=1e-5)
    assert float(ranking.kendall_tau_b(a, b)) == pytest.approx(golden["kendall_b"][0], abs=1e-5)
    assert np.isnan(ranking.spearman(np.ones(200), b))
    assert np.isnan(ranking.kendall_tau_b(a, np.ones(200)))


def scored(n, seed, values, weighted):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, values, n).astype(np.float32)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    weight = rng.integers(0, 4, n).astype(np.float32) if weighted else np.ones(n, np.float32)
    weight[:2] = 1
    return score, y, weight


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 200),
    seed=st.integers(0, 10**6),
    values=st.sampled_from([2, 7, 10**5]),
    weighted=st.booleans(),
)
def test_live_sklearn_and_scipy(n, seed, values, weighted):
    score, y, weight = scored(n, seed, values, weighted)
    other = np.random.default_rng(seed + 1).integers(0, values, n) + score
    found = measure(np.where(weight > 0, score, np.nan), y, other, weight)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, score, sample_weight=weight), abs=1e-5)
    precision = sk.average_precision_score(y, score, sample_weight=weight)
    assert found["average_precision"] == pytest.approx(precision, abs=1e-5)
    again = np.repeat(np.arange(n), weight.astype(int))
    for against, prefix in ((y, "outcome_"), (other, "")):
        varied = np.ptp(score[again]) and np.ptp(against[again])
        rho = stats.spearmanr(score[again], against[again])[0] if varied else np.nan
        tau = stats.kendalltau(score[again], against[again])[0]
        assert found[prefix + "spearman"] == pytest.approx(rho, abs=5e-5, nan_ok=True)
        assert found[prefix + "kendall"] == pytest.approx(tau, abs=5e-5, nan_ok=True)
    for name in ("spearman", "kendall"):
        assert found["closed_" + name] == pytest.approx(found["outcome_" + name], abs=5e-5, nan_ok=True)


def risks_by_definition(confidence, correct):
    """Risk of the i surest, i = 1 ... n, averaged over many random orders of the ties."""
    rng = np.random.default_rng(0)
    total = np.zeros(len(confidence))
    for _ in range(4000):
        order = np.lexsort((rng.random(len(confidence)), -confidence))
        total += np.cumsum(1 - correct[order]) / np.arange(1, len(confidence) + 1)
    return total / 4000


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 250), seed=st.integers(0, 10**6))
def test_risk_coverage_without_ties_is_the_definition(n, seed):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.permutation(n), (rng.random(n) < rng.random()).astype(int)
    errors = np.cumsum(1 - correct[np.argsort(-confidence)])
    risk = errors / np.arange(1, n + 1)
    best = np.cumsum(np.sort(1 - correct)) / np.arange(1, n + 1)
    found = measure(confidence, correct)
    assert found["aurc"] == pytest.approx(risk.mean(), abs=1e-5)
    assert found["eaurc"] == pytest.approx(risk.mean() - best.mean(), abs=1e-5)
    trapezoids = (np.concatenate([[0], errors])[:-1] + errors) / 2
    assert found["augrc"] == pytest.approx(trapezoids.sum() / n**2, abs=1e-5)
    allowed = np.arange(1, n + 1)[risk <= 0.05]
    assert found["coverage_at_5"] == pytest.approx(max(allowed, default=0) / n, abs=1e-6)
    if n % 5 == 0:
        assert found["risk_at_80"] == pytest.approx(risk[4 * n // 5 - 1], abs=1e-5)
        assert found["accuracy_at_80"] == pytest.approx(1 - risk[4 * n // 5 - 1], abs=1e-5)


def test_ties_share_their_errors_by_expectation():
    rng = np.random.default_rng(4)
    confidence = rng.integers(5, 10, 50)
    correct = (rng.random(50) < confidence / 10).astype(int)
    risks = risks_by_definition(confidence, correct)
    found = measure(confidence, correct)
    assert found["aurc"] == pytest.approx(risks.mean(), abs=2e-3)
    assert found["risk_at_80"] == pytest.approx(risks[39], abs=4e-3)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 200), seed=st.integers(0, 10**6), values=st.sampled_from([2, 7, 10**5]))
def test_augrc_follows_from_auroc_and_accuracy(n, seed, values):
    score, y, weight = scored(n, seed, values, True)
    a = (weight * y).sum() / weight.sum()
    expected = (1 - sk.roc_auc_score(y, score, sample_weight=weight)) * a * (1 - a) + 0.5 * (1 - a) ** 2
    assert measure(score, y, weight=weight)["augrc"] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 80), seed=st.integers(0, 10**6))
def test_counts_are_copies_and_row_order_is_free(n, seed):
    score, y, weight = scored(n, seed, 6, True)
    again = np.random.default_rng(seed).permutation(np.repeat(np.arange(n), weight.astype(int)))
    once, copied = measure(score, y, weight=weight), measure(score[again], y[again])
    assert once == pytest.approx(copied, abs=3e-5, nan_ok=True)


def test_perfect_and_reversed_order():
    correct = np.repeat([1, 0], [30, 10])
    best, worst = (ranking.risk_coverage(sign * np.arange(40), correct) for sign in (-1, 1))
    assert float(ranking.excess_aurc(best)) == pytest.approx(0, abs=1e-6)
    assert float(ranking.excess_aurc(worst)) > 0.3
    assert float(ranking.coverage_at_risk(best, 0.05)) == pytest.approx(31 / 40)
    assert float(ranking.coverage_at_risk(worst, 0.05)) == 0
    assert float(ranking.risk_at_coverage(best, 0.75)) == 0


def test_large_sets_stay_exact_under_jit():
    rng = np.random.default_rng(0)
    n = 100_000
    score = rng.integers(0, 101, n)
    y = (rng.random(n) < score / 100).astype(int)
    other = score + rng.integers(0, 60, n)
    arrays = jnp.asarray(score), jnp.asarray(y), jnp.asarray(other)

    @jax.jit
    def both(score, y, other):
        return ranking.auroc(score, y), ranking.kendall_tau_b(score, other, distinct=161)

    expected = sk.roc_auc_score(y, score), stats.kendalltau(score, other)[0]
    np.testing.assert_allclose(both(*arrays), expected, atol=2e-5)


def test_one_class_or_no_weight_is_nan():
    score = np.array([0.1, 0.9])
    assert np.isnan(ranking.auroc(score, np.ones(2)))
    assert np.isnan(ranking.average_precision(score, np.zeros(2)))
    assert np.isnan(ranking.spearman(score, np.ones(2)))
    assert np.isnan(ranking.aurc(ranking.risk_coverage(score, np.ones(2), np.zeros(2))))
