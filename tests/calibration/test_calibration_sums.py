"""Binned sums and what is read from them, against exact fractions, torchmetrics, netcal and sklearn."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.classification.calibration_error import _ce_compute

from csp_jax.calibration import metrics
from csp_jax.calibration.binning import bin_edges, bin_index

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
EXACT = json.loads((GOLDEN / "ece_exact.json").read_text())
LIBRARIES = json.loads((GOLDEN / "metrics.json").read_text())
INPUTS = np.load(GOLDEN / "metrics_inputs.npz")
CASES = ["beta500", "percent400", "edges20", "two_value", "all_ones", "all_zero", "single"]
BINS = [1, 5, 10, 15, 20, 100]


def case(name):
    return INPUTS[f"{name}_p"], INPUTS[f"{name}_y"]


def whole_percents(p):
    return np.round(100 * p).astype(np.int32)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("side", ["right_closed", "left_closed"])
def test_golden_percents_on_every_edge(name, bins, side):
    p, y = case(name)
    golden = EXACT[name][f"bins{bins}"][side]
    make = partial(metrics.bin_sums, bins=bins, binning=side)
    forms = [whole_percents(p), p, p.astype(np.float32), jnp.asarray(p, jnp.float32)]
    for sums in [*(make(form, y) for form in forms), jax.jit(make)(jnp.asarray(whole_percents(p)), y)]:
        assert float(metrics.ece(sums)) == pytest.approx(golden["ece"], abs=2e-6)
        assert float(metrics.mce(sums)) == pytest.approx(golden["mce"], abs=2e-6)
    sums = make(whole_percents(p), y)
    gaps = np.abs(np.asarray(sums.confidence, np.float64) - 100 * np.asarray(sums.correct, np.float64))
    assert Fraction(int(gaps.sum()), 100 * len(y)) == Fraction(golden["ece_fraction"])


@settings(max_examples=60, deadline=None)
@given(bins=st.integers(1, 101), value=st.integers(0, 100))
def test_every_percent_falls_where_fractions_say(bins, value):
    share = Fraction(value, 100)
    right = next(k for k in range(bins) if share <= Fraction(k + 1, bins))
    left = next(k for k in reversed(range(bins)) if share >= Fraction(k, bins))
    for kind in (np.array([value]), np.array([value / 100]), np.array([value / 100], np.float32)):
        assert bin_index(kind, bins, "right_closed")[0] == right
        assert bin_index(kind, bins, "left_closed")[0] == left


def test_edges_decide_between_fifteen_and_five_percent():
    confidence, correct = np.repeat([100, 90], 500), np.repeat([1, 0, 1], [400, 100, 500])
    assert float(metrics.ece(metrics.bin_sums(confidence, correct))) == pytest.approx(0.15, abs=1e-7)
    left = metrics.bin_sums(confidence, correct, binning="left_closed")
    assert float(metrics.ece(left)) == pytest.approx(0.05, abs=1e-7)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("name", CASES)
def test_golden_torchmetrics_and_netcal(name, bins):
    p, y = case(name)
    golden = LIBRARIES[name]["binned"][f"bins{bins}"]
    for dtype, tag in ((np.float32, "f32"), (np.float64, "f64")):
        sums = metrics.bin_sums(p.astype(dtype), y, bins=bins, binning="torchmetrics")
        assert float(metrics.ece(sums)) == pytest.approx(golden[f"torchmetrics_{tag}_l1"], abs=1e-5)
        assert float(metrics.mce(sums)) == pytest.approx(golden[f"torchmetrics_{tag}_max"], abs=1e-5)
        root = float(metrics.root_mean_squared_ce(sums))
        assert root == pytest.approx(golden[f"torchmetrics_{tag}_l2"], abs=1e-5)
    sums = metrics.bin_sums(p, y, bins=bins, binning="netcal")
    assert float(metrics.ece(sums)) == pytest.approx(golden["netcal_ece_detection"], abs=1e-5)
    assert float(metrics.mce(sums)) == pytest.approx(golden["netcal_mce_detection"], abs=1e-5)
    mean = float(metrics.average_calibration_error(sums))
    assert mean == pytest.approx(golden["netcal_ace_detection"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_golden_brier_nll_and_f1(name):
    p, y = case(name)
    golden = LIBRARIES[name]["scalar"]
    for confidence in [p] if name == "beta500" else [p, whole_percents(p)]:
        scores = metrics.score_sums(confidence, y, clip=np.finfo(np.float64).eps)
        assert float(metrics.brier(scores)) == pytest.approx(golden["brier_sklearn"], abs=1e-5)
        assert float(metrics.nll(scores)) == pytest.approx(golden["logloss_sklearn"], rel=1e-5)
    found = metrics.precision_recall_f1(p >= 0.5, y)
    expected = [golden[key] for key in ("precision", "recall", "f1", "yes_ratio")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


SIZE = 512


def padded(values, fill=np.nan):
    """Up to SIZE rows: one compilation for every n, and padding is proved on the way."""
    return np.pad(np.asarray(values, np.float32), (0, SIZE - len(values)), constant_values=fill)


def outcomes(n, seed, whole=True):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 101, n) / 100 if whole else rng.random(n)
    return p, (rng.random(n) < p**1.5).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 300),
    seed=st.integers(0, 10**6),
    bins=st.sampled_from([1, 3, 10, 15, 40]),
    whole=st.booleans(),
)
def test_live_torchmetrics(n, seed, bins, whole):
    p, y = outcomes(n, seed, whole)
    weight = padded(np.ones(n), 0)
    sums = metrics.bin_sums(padded(p), padded(y), weight, bins=bins, binning="torchmetrics")
    tensor, target = torch.tensor(p, dtype=torch.float32), torch.tensor(y)
    for function, norm in ((metrics.ece, "l1"), (metrics.mce, "max"), (metrics.root_mean_squared_ce, "l2")):
        expected = float(binary_calibration_error(tensor, target, n_bins=bins, norm=norm))
        assert float(function(sums)) == pytest.approx(expected, abs=1e-5)
    debiased = float(metrics.debiased_squared_ce(sums))
    if (np.asarray(sums.weight) != 1).all() and debiased > 1e-4:
        edges = torch.linspace(0, 1, bins + 1)
        expected = float(_ce_compute(tensor, target.float(), edges, norm="l2", debias=True))
        assert debiased == pytest.approx(expected**2, abs=1e-5)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_torch_edges_bit_by_bit(dtype, kind):
    for bins in range(1, 130):
        expected = torch.linspace(0, 1, bins + 1, dtype=dtype).numpy()
        np.testing.assert_array_equal(bin_edges(bins, "torchmetrics", kind), expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 10**6), weighted=st.booleans())
def test_live_sklearn_with_counts_and_padding(n, seed, weighted):
    p, y = outcomes(n, seed, whole=False)
    weight = np.random.default_rng(seed).integers(0, 3, n) if weighted else np.ones(n, int)
    weight[0] = 1
    arrays = padded(np.where(weight > 0, p, np.nan)), padded(y), padded(weight, 0)
    scores = metrics.score_sums(*arrays)
    brier = sk.brier_score_loss(y, p, sample_weight=weight, pos_label=1)
    assert float(metrics.brier(scores)) == pytest.approx(brier, abs=1e-5)
    log_loss = sk.log_loss(y, p, sample_weight=weight, labels=[0, 1])
    assert float(metrics.nll(scores)) == pytest.approx(log_loss, rel=1e-4, abs=1e-5)
    said = (p > 0.4).astype(int)
    options = {"sample_weight": weight, "average": "binary", "zero_division": 0}
    expected = sk.precision_recall_fscore_support(y, said, **options)
    found = metrics.precision_recall_f1(padded(said), *arrays[1:])
    np.testing.assert_allclose(found[:3], expected[:3], atol=1e-5)
    copies = np.repeat(np.arange(n), weight)
    for name in ("right_closed", "left_closed", "netcal", "torchmetrics"):
        once = metrics.bin_sums(*arrays, binning=name)
        many = metrics.bin_sums(padded(p[copies]), padded(y[copies]), padded(np.ones(len(copies)), 0), binning=name)
        for function in (metrics.ece, metrics.mce, metrics.debiased_ece):
            assert float(function(once)) == pytest.approx(float(function(many)), abs=1e-5)


def test_merging_is_associative_and_exact_on_percents():
    p, y = outcomes(3000, 7)
    parts = [metrics.bin_sums(whole_percents(p[i::3]), y[i::3], bins=15, binning="left_closed") for i in range(3)]
    a, b, c = parts
    whole = metrics.bin_sums(whole_percents(p), y, bins=15, binning="left_closed")
    stepwise = metrics.BinSums.zeros(15, "left_closed")
    for start in range(0, 3000, 500):
        rows = slice(start, start + 500)
        stepwise = stepwise.update(whole_percents(p[rows]), y[rows], binning="left_closed")
    for merged in ((a + b) + c, a + (b + c), c + a + b, metrics.merge(parts), stepwise):
        for left, right in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(left, right)


def test_eight_devices_equal_one_and_numpy():
    devices = jax.devices()
    assert len(devices) == 8, "tests/conftest.py asks for eight CPU devices"
    p, y = outcomes(1000, 11, whole=False)
    confidence = np.concatenate([p, np.full(24, np.nan)]).astype(np.float32)
    correct = np.concatenate([y, np.full(24, 9)])
    weight = np.concatenate([np.ones(1000), np.zeros(24)]).astype(np.float32)
    spec = PartitionSpec("data")

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=Mesh(np.array(devices), ("data",)),
        in_specs=(spec, spec, spec),
        out_specs=PartitionSpec(),
    )
    def reduce(confidence, correct, weight):
        binned = metrics.bin_sums(confidence, correct, weight, bins=15)
        return binned.psum("data"), metrics.score_sums(confidence, correct, weight).psum("data")

    binned, scores = reduce(confidence, correct, weight)
    bins = np.clip(np.ceil(p.astype(np.float32) * 15).astype(int) - 1, 0, 14)
    gaps = [abs((p[bins == k] - y[bins == k]).sum()) / 1000 for k in range(15)]
    assert float(metrics.ece(binned)) == pytest.approx(sum(gaps), abs=1e-5)
    assert float(metrics.brier(scores)) == pytest.approx(((p - y) ** 2).mean(), abs=1e-5)
    assert float(metrics.accuracy(scores)) == pytest.approx(y.mean(), abs=1e-6)
    assert float(metrics.mean_confidence(scores)) == pytest.approx(p.mean(), abs=1e-5)
    np.testing.assert_array_equal(binned.weight, np.bincount(bins, minlength=15))


def test_float32_sums_of_a_million():
    p, y = outcomes(10**6, 3, whole=False)
    expected = sum(abs((p - y)[(p > k / 10) & (p <= (k + 1) / 10) | ((k == 0) & (p == 0))].sum()) for k in range(10))
    assert float(metrics.ece(metrics.bin_sums(p, y))) == pytest.approx(expected / 10**6, abs=1e-5)
    assert float(metrics.brier(metrics.score_sums(p, y))) == pytest.approx(((p - y) ** 2).mean(), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_brier_split_is_murphys(n, seed):
    p, y = outcomes(n, seed)
    c = whole_percents(p)
    percent = np.pad(c, (0, SIZE - n))
    columns = percent, padded(y), padded(np.ones(n), 0)
    scores = metrics.score_sums(*columns)
    split = metrics.brier_split(metrics.sums_at(percent, *columns, rows=101), scores)
    groups = [(value, y[c == value]) for value in np.unique(c)]
    reliability = sum(len(g) * (g.mean() - value / 100) ** 2 for value, g in groups) / n
    resolution = sum(len(g) * (g.mean() - y.mean()) ** 2 for _, g in groups) / n
    expected = [reliability, resolution, y.mean() * (1 - y.mean())]
    np.testing.assert_allclose(split[:3], expected, atol=1e-5)
    assert float(split.within_bin) == pytest.approx(0, abs=1e-5)
    coarse = metrics.brier_split(metrics.bin_sums(*columns), scores)
    parts = coarse.reliability + coarse.refinement + coarse.within_bin
    assert float(parts) == pytest.approx(((p - y) ** 2).mean(), abs=1e-5)
    assert float(metrics.best_constant_brier(*columns[1:])) == pytest.approx(expected[2], abs=1e-6)


def test_debiased_ece_is_the_mean_of_redrawn_bins():
    p, y = outcomes(400, 5)
    sums = metrics.bin_sums(whole_percents(p), y)
    weight = np.asarray(sums.weight, float)
    confidence, accuracy = np.asarray(sums.confidence) / weight / 100, np.asarray(sums.correct) / weight
    draws = np.random.default_rng(0).normal(accuracy, np.sqrt(accuracy * (1 - accuracy) / weight), (200_000, 10))
    redrawn = (np.abs(draws - confidence) * weight).sum(1).mean() / weight.sum()
    expected = 2 * float(metrics.ece(sums)) - redrawn
    assert expected > 0.02
    assert float(metrics.debiased_ece(sums)) == pytest.approx(expected, abs=3e-4)


def test_debiasing_brings_a_calibrated_model_nearer_to_zero():
    rng = np.random.default_rng(1)
    p = rng.random((200, 100)).astype(np.float32)
    y = (rng.random((200, 100)) < p).astype(np.float32)
    sums = jax.vmap(metrics.bin_sums)(jnp.asarray(p), jnp.asarray(y))
    plain, debiased = jax.vmap(metrics.ece)(sums).mean(), jax.vmap(metrics.debiased_ece)(sums).mean()
    # At a true error of 0 the redrawn bins are wider by sqrt(2), so about 2 - sqrt(2) of the bias is left.
    assert float(debiased) < 0.7 * float(plain)


def test_reliability_curve_has_wilson_bands():
    p, y = outcomes(500, 2, whole=False)
    p = 0.5 * p
    curve = metrics.reliability_curve(metrics.bin_sums(p, y), level=0.9)
    index = np.minimum(np.ceil(p * 10).astype(int) - 1, 9)
    for k in range(5):
        inside = index == k
        assert float(curve.confidence[k]) == pytest.approx(p[inside].mean(), abs=1e-5)
        test = stats.binomtest(int(y[inside].sum()), int(inside.sum()))
        low, high = test.proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose([curve.low[k], curve.high[k]], [low, high], atol=1e-5)
    assert np.isnan(curve.accuracy[5:]).all()
    assert np.isnan(curve.low[5:]).all()


def test_nothing_is_nan_and_wrong_arguments_are_refused():
    empty = metrics.bin_sums(np.array([0.5]), np.array([1]), np.array([0.0]))
    for function in (metrics.ece, metrics.mce, metrics.debiased_ece, metrics.average_calibration_error):
        assert np.isnan(function(empty))
    assert np.isnan(metrics.brier(metrics.score_sums(np.array([0.5]), np.array([1]), np.array([0.0]))))
    with pytest.raises(ValueError, match="unknown binning 'middle'"):
        bin_index(np.array([0.5]), 10, "middle")
    with pytest.raises(ValueError, match="at least one bin"):
        bin_index(np.array([0.5]), 0)
    with pytest.raises(TypeError, match="booleans"):
        metrics.bin_sums(np.array([True]), np.array([1]))


def test_a_sure_and_wrong_answer_costs_the_stated_clip():
    scores = metrics.score_sums(np.array([100, 0]), np.array([0, 0]))
    assert float(metrics.nll(scores)) == pytest.approx(-np.log(metrics.NLL_CLIP) / 2, rel=1e-6)
