"""Smooth ECE against a quadrature of its definition, equal-mass ECE against sorted bins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from csp_jax.calibration import smooth

SIZE = 512


def padded(values, fill=np.nan):
    return np.pad(np.asarray(values, np.float32), (0, SIZE - len(values)), constant_values=fill)


def smooth_ece_by_quadrature(p, y, weight):
    """Mirror images of every Gaussian, a fine trapezoid rule, and scipy's root finder, in float64."""
    t = np.linspace(0, 1, 2001)

    def error(scale):
        images = np.concatenate([np.stack([2 * m + p, 2 * m - p]) for m in range(-2, 3)])
        kernel = stats.norm.pdf(t[:, None, None], images, scale).sum(1)
        return np.trapezoid(np.abs(kernel @ (weight * (y - p)) / weight.sum()), t)

    return optimize.brentq(lambda scale: error(scale) - scale, 1e-3, 1.0, xtol=1e-7)


def sample(n, seed, kind):
    rng = np.random.default_rng(seed)
    p = {
        "beta": rng.beta(0.7, 0.6, n),
        "percent": rng.integers(0, 101, n) / 100,
        "few": rng.choice([0, 0.9, 1], n),
    }
    # Too sure on both sides: residuals of both signs, so that the bandwidth decides how much they cancel.
    return p[kind], (rng.random(n) < 0.5 + 0.3 * (p[kind] - 0.5)).astype(int)


@pytest.mark.parametrize("kind", ["beta", "percent", "few"])
@pytest.mark.parametrize(("n", "seed"), [(30, 0), (180, 1)])
def test_smooth_ece_is_its_definition(kind, n, seed):
    p, y = sample(n, seed, kind)
    weight = np.random.default_rng(seed).integers(0, 3, n)
    expected = smooth_ece_by_quadrature(p, y, weight)
    found = smooth.smooth_ece(padded(p), padded(y), padded(weight, 0))
    assert float(found) == pytest.approx(expected, abs=2e-5)


def test_smooth_ece_of_one_confidence_is_its_gap():
    assert float(smooth.smooth_ece(np.ones(50), np.repeat([1, 0], [17, 33]))) == pytest.approx(0.66, abs=2e-6)
    assert float(smooth.smooth_ece(np.full(4, 50), np.array([1, 0, 1, 0]))) == pytest.approx(0, abs=2e-6)
    assert np.isnan(smooth.smooth_ece(np.ones(2), np.ones(2), np.zeros(2)))


def test_smooth_ece_of_many_blocks_equals_one_block():
    p, y = sample(9000, 3, "percent")
    counts = np.zeros((101, 2))
    np.add.at(counts, (np.round(100 * p).astype(int), y), 1)
    values, outcomes = np.repeat(np.arange(101), 2), np.tile([0, 1], 101)
    together = smooth.smooth_ece(values, outcomes, counts.reshape(-1))
    assert float(smooth.smooth_ece(p, y)) == pytest.approx(float(together), abs=3e-6)


def equal_mass_by_sorting(p, y, bins):
    middle = (stats.rankdata(p) - 0.5) / len(p)
    index = np.minimum(np.floor(bins * middle + 1e-9).astype(int), bins - 1)
    return sum(abs((p - y)[index == k].sum()) for k in range(bins)) / len(p)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["beta", "percent", "few"]),
    bins=st.sampled_from([1, 4, 10]),
)
def test_equal_mass_ece_is_its_definition(n, seed, kind, bins):
    p, y = sample(n, seed, kind)
    p = p.astype(np.float32).astype(float)
    found = smooth.equal_mass_ece(padded(p), padded(y), padded(np.ones(n), 0), bins=bins)
    assert float(found) == pytest.approx(equal_mass_by_sorting(p, y, bins), abs=1e-5)


def test_equal_mass_bins_are_equal_without_ties():
    p, y = sample(400, 8, "beta")
    chunks = np.split(np.argsort(p), 8)
    expected = sum(abs((p - y)[chunk].sum()) for chunk in chunks) / 400
    assert float(smooth.equal_mass_ece(p, y, bins=8)) == pytest.approx(expected, abs=1e-5)


def test_both_run_under_jit_and_vmap_over_weights():
    p, y = sample(300, 9, "percent")
    weights = jnp.asarray(np.random.default_rng(0).poisson(1.0, (3, 300)), jnp.float32)
    for function in (smooth.smooth_ece, smooth.equal_mass_ece):
        many = jax.jit(jax.vmap(lambda weight, f=function: f(p, y, weight)))(weights)
        for weight, value in zip(np.asarray(weights, int), many, strict=True):
            copies = np.repeat(np.arange(300), weight)
            one = function(padded(p[copies]), padded(y[copies]), padded(np.ones(len(copies)), 0))
            assert float(value) == pytest.approx(float(one), abs=1e-5)
