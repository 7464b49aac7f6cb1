"""Bootstrap intervals against analytic standard errors, scipy and simulation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from csp_jax.calibration import metrics
from csp_jax.calibration.bootstrap import (
    bootstrap,
    null_ece,
    null_ece_of,
    over_seeds,
    paired_difference,
    t_interval,
)
from csp_jax.calibration.scores import PairScores, make_pairs


@dataclass(frozen=True)
class Mean:
    """The simplest statistic: a weighted mean, whose standard error is known."""

    def __call__(self, data, weight):
        return {"mean": metrics.ratio((weight * data).sum(), weight.sum())}


def width(interval):
    return interval.high - interval.low


def test_width_is_the_analytic_standard_error():
    y = (np.random.default_rng(0).random(900) < 0.7).astype(np.float32)
    found = bootstrap(Mean(), y, resamples=4000, level=0.9)["mean"]
    assert found.value == pytest.approx(y.mean(), abs=1e-6)
    expected = 2 * stats.norm.ppf(0.95) * y.std() / np.sqrt(900)
    assert width(found) == pytest.approx(expected, rel=0.08)
    assert found.low < found.value < found.high


def test_nominal_coverage():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        y = (rng.random(120) < 0.6).astype(np.float32)
        found = bootstrap(Mean(), y, resamples=400, seed=seed)["mean"]
        hits += found.low <= 0.6 <= found.high
    # 95% nominal: 200 trials stay within 3.3 standard errors.
    assert 0.90 <= hits / 200 <= 0.99


def test_copies_of_an_image_tell_nothing_new():
    once = (np.random.default_rng(2).random(200) < 0.5).astype(np.float32)
    copied, images = np.repeat(once, 6), np.repeat([f"image{i}" for i in range(200)], 6)
    clustered = bootstrap(Mean(), copied, clusters=images, resamples=2000)["mean"]
    single = bootstrap(Mean(), once, resamples=2000)["mean"]
    naive = bootstrap(Mean(), copied, resamples=2000)["mean"]
    assert width(clustered) == pytest.approx(width(single), rel=0.1)
    assert width(clustered) / width(naive) == pytest.approx(np.sqrt(6), rel=0.12)


def test_clusters_of_unequal_size_against_the_ratio_estimator():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(300), rng.integers(1, 9, 300))
    y = (rng.random(images.size) < rng.beta(1, 1, 300)[images]).astype(np.float32)
    found = bootstrap(Mean(), y, clusters=images, resamples=3000)["mean"]
    residual = np.bincount(images, y - y.mean())
    error = np.sqrt((residual**2).sum()) / images.size
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.1)


def answers(n, seed, bins=10):
    rng = np.random.default_rng(seed)
    percent = rng.integers(0, 101, n)
    y = (rng.random(n) < percent / 100).astype(int)
    return percent, y, make_pairs(percent, y, bins, "right_closed")


def test_intervals_of_auroc_and_brier_agree_with_scipy():
    percent, y, pairs = answers(300, 4)
    found = bootstrap(PairScores(), pairs, resamples=2000)
    functions = {
        "auroc": lambda p, y: roc_auc_score(y, p),
        "brier": lambda p, y: ((p / 100 - y) ** 2).mean(),
    }
    for name, function in functions.items():
        assert found[name].value == pytest.approx(function(percent, y), abs=1e-5)
        expected = stats.bootstrap(
            (percent, y),
            function,
            paired=True,
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=0,
        ).confidence_interval
        spread = expected.high - expected.low
        np.testing.assert_allclose(found[name][1:], expected, atol=0.12 * spread)


def test_seed_padding_and_weights():
    _, _, pairs = answers(100, 5)
    first, again, other = (bootstrap(PairScores(), pairs, resamples=100, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["ece"].value == other["ece"].value
    assert first["ece"].low != other["ece"].low
    dropped = np.ones(100, np.float32)
    dropped[70:] = 0
    short = jax.tree.map(lambda leaf: leaf[:70], pairs)
    kept = bootstrap(PairScores(), short, resamples=100)
    masked = bootstrap(PairScores(), pairs, weight=dropped, resamples=100)
    for name, interval in kept.items():
        assert masked[name].value == pytest.approx(interval.value, abs=1e-5), name
    assert np.isnan(bootstrap(Mean(), np.ones(3), resamples=0)["mean"].low)


def test_undefined_scores_are_nan():
    pairs = make_pairs(np.array([73]), np.array([1]), 10, "right_closed")
    found = bootstrap(PairScores(), pairs, resamples=100)
    assert np.isnan(found["auroc"]).all()
    assert found["ece"].value == pytest.approx(0.27, abs=1e-6)
    with pytest.raises(ValueError, match="lengths"):
        bootstrap(Mean(), {"a": np.ones(3), "b": np.ones(4)})
    with pytest.raises(ValueError, match="2 cluster ids for 3 examples"):
        bootstrap(Mean(), np.ones(3), clusters=["a", "b"])


def test_paired_difference_cancels_what_both_share():
    rng = np.random.default_rng(6)
    hard = rng.random(500)
    first, second = ((rng.random(500) < 0.05) ^ (hard < share) for share in (0.7, 0.6))
    first, second = first.astype(np.float32), second.astype(np.float32)
    found = paired_difference(Mean(), first, second, resamples=2000)["mean"]
    assert found.value == pytest.approx((first - second).mean(), abs=1e-6)
    assert width(found) == pytest.approx(2 * 1.96 * (first - second).std() / np.sqrt(500), rel=0.1)
    same = paired_difference(Mean(), first, first, resamples=100)["mean"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_over_seeds_adds_the_variance_of_images_and_of_seeds():
    rng = np.random.default_rng(7)
    image = rng.normal(0, 1, 400)
    runs = [(image + shift).astype(np.float32) for shift in rng.normal(0, 0.1, 8)]
    found = over_seeds(Mean(), runs, resamples=4000)["mean"]
    means = np.array([run.mean() for run in runs])
    expected = 2 * 1.96 * np.sqrt(image.var() / 400 + means.var(ddof=1) / 8)
    assert found.value == pytest.approx(means.mean(), abs=1e-5)
    assert width(found) == pytest.approx(expected, rel=0.1)
    one = over_seeds(Mean(), runs[:1], resamples=2000)["mean"]
    assert width(one) == pytest.approx(2 * 1.96 * image.std() / 20, rel=0.1)


def test_t_interval_is_scipys():
    values = [0.61, 0.66, 0.64]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose(t_interval(values, 0.9), [np.mean(values), *expected], rtol=1e-9)
    assert np.isnan(t_interval([0.5]).low)


@pytest.mark.parametrize(("n", "low", "high"), [(80, 0.08, 0.115), (200, 0.05, 0.074)])
def test_null_ece_of_small_cells(n, low, high):
    percent = np.random.default_rng(8).integers(0, 101, n)
    found = null_ece(percent, 10, 0)
    assert low < found < high
    rng = np.random.default_rng(9)
    index = np.maximum(-(-percent // 10) - 1, 0)
    expected = []
    for _ in range(2000):
        gap = np.bincount(index, (rng.random(n) < percent / 100) - percent / 100, 10)
        expected.append(np.abs(gap).sum() / n)
    assert found == pytest.approx(np.mean(expected), rel=0.03)
    assert found == null_ece(percent, 10, 0)
    assert found != null_ece(percent, 10, 1)


def test_null_ece_of_weights_and_of_certainty():
    percent, _, pairs = answers(90, 10)
    weight = np.repeat([1.0, 0.0], [60, 30])
    short = null_ece(percent[:60], 10, 3)
    assert null_ece_of(pairs, 10, 3, weight=weight) == pytest.approx(short, rel=0.03)
    assert null_ece(np.array([0, 100, 100])) == 0
    assert null_ece(jnp.asarray([0.0, 1.0])) == 0
