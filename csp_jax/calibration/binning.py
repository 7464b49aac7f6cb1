"""Which confidence falls into which equal-width bin: the conventions by name, exact at the edges.

Two kinds of confidences are understood everywhere in this package: integer arrays are whole percents (0 to
100) and are binned in integer arithmetic; floating arrays are probabilities in [0, 1] and are compared with
edges in their own dtype. `right_closed` and `left_closed` use edges k/K rounded once, so that 0.3 written
in float32 or float64 is equal to the edge 3/10 of that dtype; the edges of `np.linspace` miss .3, .6 and
.7.
"""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

Binning = Literal["right_closed", "left_closed", "torchmetrics", "netcal"]
BINNINGS: tuple[str, ...] = get_args(Binning)


def _namespace(array: object) -> ModuleType:
    """numpy for host arrays (float64 kept), jax.numpy for device arrays and tracers."""
    return jnp if isinstance(array, jax.Array) else np


def is_percent(confidence: Shaped[jax.Array | np.ndarray, ...]) -> bool:
    """True if the dtype says that these are whole percents. Raises TypeError for booleans."""
    if confidence.dtype == bool:
        raise TypeError("confidences are booleans; give whole percents or probabilities in [0, 1]")
    return bool(jnp.issubdtype(confidence.dtype, jnp.integer))


def probabilities(confidence: Shaped[jax.Array | np.ndarray, ...]) -> Float[jax.Array, ...]:
    """Confidences as float32 probabilities in [0, 1]; percent i becomes the float32 nearest to i/100."""
    if is_percent(confidence):
        # A table, because a compiler may turn x / 100 into x * 0.01, which is not always the nearest float.
        return jnp.asarray((np.arange(101) / 100).astype(np.float32))[jnp.asarray(confidence)]
    return jnp.asarray(confidence, jnp.float32)


def percents(confidence: Shaped[jax.Array | np.ndarray, ...]) -> Float[jax.Array, ...]:
    """Confidences as float32 percents in [0, 100]; whole percents stay whole, so their sums are exact."""
    if is_percent(confidence):
        return jnp.asarray(confidence, jnp.float32)
    if isinstance(confidence, np.ndarray):
        return jnp.asarray(100 * confidence.astype(np.float64), jnp.float32)
    return 100 * jnp.asarray(confidence, jnp.float32)


def bin_edges(bins: int, binning: Binning = "right_closed", dtype: DTypeLike = np.float64) -> np.ndarray:
    """The `bins + 1` edges in `dtype`.

    `torchmetrics`: torch.linspace (from both ends); `netcal`: np.linspace; else k/K rounded once.
    """
    steps = np.arange(bins + 1)
    if binning == "netcal":
        return np.linspace(0.0, 1.0, bins + 1).astype(dtype)
    if binning == "torchmetrics":
        # torch.linspace counts from both ends and multiplies and adds in one rounding; Fractions do the same.
        step = Fraction(float(np.dtype(dtype).type(1) / np.dtype(dtype).type(bins)))
        edges = [step * int(k) if k < (bins + 1) // 2 else 1 - step * int(bins - k) for k in steps]
        return np.array([float(edge) for edge in edges]).astype(dtype)
    return (steps / bins).astype(dtype)


def bin_count(bins: int, binning: Binning = "right_closed") -> int:
    """Rows that the sums need: torchmetrics puts confidences of exactly 1 into a bin of their own."""
    return bins + 1 if binning == "torchmetrics" else bins


def bin_index(
    confidence: Shaped[jax.Array | np.ndarray, " n"], bins: int, binning: Binning = "right_closed"
) -> Int[jax.Array | np.ndarray, " n"]:
    """The bin (0-based) of each confidence; host arrays give a host array, device arrays a device array.

    `right_closed`: (k/K, (k+1)/K] with 0 in the first bin. `left_closed`: [k/K, (k+1)/K) with 1 in the last.
    `torchmetrics` and `netcal` copy what those libraries do, floating edges included.
    Raises ValueError for an unknown convention or fewer than one bin.
    """
    if binning not in BINNINGS:
        raise ValueError(f"unknown binning {binning!r}: use one of {', '.join(BINNINGS)}")
    if bins < 1:
        raise ValueError(f"bins = {bins}: at least one bin is needed")
    space = _namespace(confidence)
    if is_percent(confidence):
        if binning == "right_closed":
            return space.maximum((confidence.astype(np.int32) * bins - 1) // 100, 0)
        if binning == "left_closed":
            return space.minimum(confidence.astype(np.int32) * bins // 100, bins - 1)
        table = bin_index(np.arange(101) / 100, bins, binning).astype(np.int32)
        return space.asarray(table)[confidence]
    edges = space.asarray(bin_edges(bins, binning, confidence.dtype))
    if binning == "right_closed":
        return (confidence[:, None] > edges[1:-1]).sum(-1).astype(np.int32)
    if binning == "torchmetrics":
        return (confidence[:, None] >= edges[1:]).sum(-1).astype(np.int32)
    return (confidence[:, None] >= edges[1:-1]).sum(-1).astype(np.int32)


def describe(bins: int, binning: Binning) -> str:
    """One line for reports: what the bins are."""
    texts = {
        "right_closed": f"{bins} equal-width bins (a, b], 0 in the first, exact edges k/{bins}",
        "left_closed": f"{bins} equal-width bins [a, b), 1 in the last, exact edges k/{bins}",
        "torchmetrics": f"{bins} equal-width bins [a, b) by torch.linspace edges, 1 in a bin of its own",
        "netcal": f"{bins} equal-width bins [a, b) by np.linspace edges, 1 in the last",
    }
    return texts[binning]
