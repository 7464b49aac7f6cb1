"""Bootstrap intervals: whole clusters (images) are drawn again, the metrics are functions of the weights.

A resample is a weight per example = its own weight x how often its cluster was drawn, so nothing is copied
and the examples are sorted once for all resamples. Arrays are padded with weight 0 to the next power of
two: data sets of similar size share one compilation.

Percentile intervals of quantities that are biased upward at small n (ECE, MCE, adaptive and smooth ECE)
inherit the bias twice and may lie above the value itself; read them beside the null ECE, or use
`debiased_ece`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from csp_jax.calibration.binning import Binning, bin_count
from csp_jax.calibration.metrics import ratio
from csp_jax.calibration.scores import Pairs, make_pairs

Statistic = Callable[[Any, jax.Array], dict[str, jax.Array]]

_BATCH = 64


class Interval(NamedTuple):
    """A value with the ends of its interval; nan where undefined."""

    value: float
    low: float
    high: float


def _bucket(n: int) -> int:
    return max(256, 1 << (n - 1).bit_length())


def _padded(array: Shaped[np.ndarray | jax.Array, "n ..."], axis: int = 0) -> jax.Array:
    """Zeros appended along `axis` up to a power of two."""
    host = np.asarray(array)
    widths = [(0, 0)] * host.ndim
    widths[axis] = (0, _bucket(host.shape[axis]) - host.shape[axis])
    return jnp.asarray(np.pad(host, widths))


def _cluster_counts(key: jax.Array, clusters: Int[jax.Array, ""], slots: int) -> Float[jax.Array, " slots"]:
    """How often each of the first `clusters` slots is drawn in as many draws with replacement."""
    drawn = jax.random.randint(key, (slots,), 0, clusters)
    return jnp.zeros(slots, jnp.float32).at[drawn].add(jnp.arange(slots) < clusters)


def _mapped(function: Callable[[jax.Array], Any], count: int) -> Any:
    """The function of 0 ... count - 1 in whole batches: a ragged last one would be compiled once more."""
    whole = -(-count // _BATCH) * _BATCH
    return jax.tree.map(lambda leaf: leaf[:count], jax.lax.map(function, jnp.arange(whole), batch_size=_BATCH))


@partial(jax.jit, static_argnames=("statistic", "resamples"))
def _resample(
    statistic: Statistic,
    data: Any,
    weight: Float[jax.Array, " n"],
    cluster: Int[jax.Array, " n"],
    clusters: Int[jax.Array, ""],
    key: jax.Array,
    resamples: int,
) -> dict[str, Float[jax.Array, "resamples+1 datasets"]]:
    """Row 0: the statistic of the data as they are; then a row a resample. Data lead with a data set axis."""

    def one(number: jax.Array) -> dict[str, jax.Array]:
        counts = _cluster_counts(jax.random.fold_in(key, number), clusters, weight.shape[0])
        drawn = jnp.where(number == 0, weight, weight * counts[cluster])
        return jax.vmap(statistic, (0, None))(data, drawn)

    return _mapped(one, resamples + 1)


def _draw(
    statistic: Statistic,
    datasets: Sequence[Any],
    clusters: Sequence[Any] | np.ndarray | None,
    weight: Float[np.ndarray, " n"] | None,
    resamples: int,
    seed: int,
) -> dict[str, Float[np.ndarray, "resamples+1 datasets"]]:
    sizes = {np.shape(leaf)[0] for data in datasets for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1:
        raise ValueError(f"arrays of one length are needed, there are lengths {sorted(sizes)}")
    (n,) = sizes
    names = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if names.shape != (n,):
        raise ValueError(f"{names.shape[0]} cluster ids for {n} examples")
    stacked = jax.tree.map(lambda *leaves: _padded(np.stack([np.asarray(leaf) for leaf in leaves]), 1), *datasets)
    weight = np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32)
    count = jnp.int32(names.max(initial=0) + 1)
    arguments = (stacked, _padded(weight), _padded(names.astype(np.int32)), count, jax.random.key(seed))
    drawn = _resample(statistic, *arguments, resamples=resamples)
    return {name: np.asarray(values, np.float64) for name, values in drawn.items()}


def _interval(values: Float[np.ndarray, " resamples+1"], level: float) -> Interval:
    """The first entry with the percentiles of the others; undefined resamples are left out."""
    tail = (1 - level) / 2
    if len(values) < 2 or np.isnan(values[0]):
        return Interval(float(values[0]), float("nan"), float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))


def bootstrap(
    statistic: Statistic,
    data: Any,
    *,
    clusters: Sequence[Any] | np.ndarray | None = None,
    weight: Float[np.ndarray, " n"] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of every score of `statistic(data, weight)`.

    `data`: a pytree of arrays that lead with n; `clusters`: an id per example (image ids), each example its
    own if absent; `weight`: counts, 0 = leave out; `resamples` may be 0 (values without intervals). The
    same seed gives the same intervals. Raises ValueError if lengths differ.
    """
    drawn = _draw(statistic, [data], clusters, weight, resamples, seed)
    return {name: _interval(values[:, 0], level) for name, values in drawn.items()}


def paired_difference(
    statistic: Statistic,
    first: Any,
    second: Any,
    *,
    clusters: Sequence[Any] | np.ndarray | None = None,
    weight: Float[np.ndarray, " n"] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of score(first) - score(second), two models on the same examples in the same order.

    Both see the same resamples, so what is hard for both cancels.
    """
    drawn = _draw(statistic, [first, second], clusters, weight, resamples, seed)
    return {name: _interval(values[:, 0] - values[:, 1], level) for name, values in drawn.items()}


def over_seeds(
    statistic: Statistic,
    datasets: Sequence[Any],
    *,
    clusters: Sequence[Any] | np.ndarray | None = None,
    weight: Float[np.ndarray, " n"] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of the mean score of several training seeds on the same examples in the same order.

    Images and seeds are crossed, not nested, so each resample draws images (one draw for all seeds) and,
    apart from it, seeds (Owen 2007, the pigeonhole bootstrap). The seeds' part is widened by sqrt(S / (S -
    1)), which makes its variance unbiased for S seeds; with 3 seeds it is still a little short, as a normal
    is beside a t. With one seed only the images vary. `t_interval` gives the spread over seeds alone.
    """
    drawn = _draw(statistic, datasets, clusters, weight, resamples, seed)
    count = len(datasets)
    chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
    widening = np.sqrt(count / (count - 1)) if count > 1 else 0.0
    result = {}
    for name, values in drawn.items():
        centre = values.mean(1)
        moved = np.take_along_axis(values[1:], chosen, 1).mean(1) - centre[1:]
        result[name] = _interval(np.concatenate([centre[:1], centre[1:] + widening * moved]), level)
    return result


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of one score per seed; nan ends for a single seed."""
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return Interval(float(array.mean()), float("nan"), float("nan"))
    reach = stats.t.ppf(0.5 + level / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return Interval(float(array.mean()), float(array.mean() - reach), float(array.mean() + reach))


@partial(jax.jit, static_argnames=("rows", "draws"))
def _null_draws(
    probability: Float[jax.Array, " n"],
    percent: Float[jax.Array, " n"],
    index: Int[jax.Array, " n"],
    weight: Float[jax.Array, " n"],
    key: jax.Array,
    rows: int,
    draws: int,
) -> Float[jax.Array, " draws"]:
    member = (index[:, None] == jnp.arange(rows)).astype(jnp.float32)
    expected = jnp.matmul(weight * percent, member, precision="highest") / 100

    def one(number: jax.Array) -> jax.Array:
        uniform = jax.random.uniform(jax.random.fold_in(key, number), probability.shape)
        right = jnp.matmul(weight * (uniform < probability), member, precision="highest")
        return ratio(jnp.abs(right - expected).sum(), weight.sum())

    return _mapped(one, draws)


def null_ece_of(
    pairs: Pairs,
    rows: int,
    seed: int = 0,
    *,
    weight: Float[np.ndarray, " n"] | None = None,
    draws: int = 1000,
) -> float:
    """`null_ece` of confidences whose bins (below `rows`) are known."""
    weight = np.ones(pairs.index.shape[0], np.float32) if weight is None else np.asarray(weight, np.float32)
    padded = [_padded(array) for array in (pairs.probability, pairs.percent, pairs.index, weight)]
    drawn = _null_draws(*padded, jax.random.key(seed), rows=rows, draws=draws)
    return float(np.asarray(drawn, np.float64).mean())


def null_ece(
    confidences: Shaped[np.ndarray, " n"],
    bins: int = 10,
    seed: int = 0,
    *,
    binning: Binning = "right_closed",
    weight: Float[np.ndarray, " n"] | None = None,
    draws: int = 1000,
) -> float:
    """The mean ECE of these confidences if each outcome were Bernoulli(confidence).

    This is what perfect calibration shows. It depends on n, on the bins and on where the confidences lie;
    an ECE near it says nothing against a model.
    """
    confidences = np.asarray(confidences)
    pairs = make_pairs(confidences, np.zeros(confidences.shape[0]), bins, binning)
    return null_ece_of(pairs, bin_count(bins, binning), seed, weight=weight, draws=draws)
