"""Where a row's canvas cells lie in their pictures, and overviews made of them on the device.

A row holds the cells (tiles, crops or patches) of all its pictures one after another in reading order, behind each
picture's its overview if it has one. What is made of a noised canvas is made of its cells by linear maps, so every
view shows the same noise.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Cells:
    """For each cell of a row: its picture, its place there, and whether it is the overview of it."""

    picture: Int[Array, "batch cells"]  # as many as there are pictures: padding
    row: Int[Array, "batch cells"]
    column: Int[Array, "batch cells"]
    grid: Int[Array, "batch cells 2"]  # rows and columns of its picture
    overview: Bool[Array, "batch cells"]
    used: Bool[Array, "batch cells"]


def lay_cells(grid: Int[Array, "batch pictures 2"], overview: Bool[Array, "batch pictures"], count: int) -> Cells:
    """The layout of `count` cells a row, from each picture's grid and whether an overview follows it."""
    tiles = grid[..., 0] * grid[..., 1]
    ends = jnp.cumsum(tiles + overview, axis=1)
    index = jnp.arange(count)
    picture = jnp.sum(index[None, :, None] >= ends[:, None, :], axis=-1)
    used = picture < grid.shape[1]
    own = jnp.minimum(picture, grid.shape[1] - 1)
    first = jnp.take_along_axis(ends - tiles - overview, own, axis=1)
    size = jnp.take_along_axis(grid, own[..., None], axis=1)
    local, columns = index - first, jnp.maximum(size[..., 1], 1)
    return Cells(
        picture=picture,
        row=local // columns,
        column=local % columns,
        grid=size,
        overview=used & (local == size[..., 0] * size[..., 1]),
        used=used,
    )


Weights = Callable[[Array, Array, int], Array]


def shrink(
    tiles: Float[Array, "batch cells side side 3"], cells: Cells, weights: Weights
) -> Float[Array, "batch cells side side 3"]:
    """At each overview cell its whole picture at the size of one cell; zeros elsewhere.

    `weights(place, times, side)` [batch, cells, side, side]: how much each pixel of the tile at `place` along an
    axis of `times` tiles counts in each pixel of the overview.
    """
    side = tiles.shape[2]
    down = weights(cells.row, cells.grid[..., 0], side).astype(tiles.dtype)
    across = weights(cells.column, cells.grid[..., 1], side).astype(tiles.dtype)
    precise = jax.lax.Precision.HIGHEST
    parts = jnp.einsum("bcox,bcxyk->bcoyk", down, tiles, precision=precise)
    parts = jnp.einsum("bcpy,bcoyk->bcopk", across, parts, precision=precise)
    shows = cells.overview[:, :, None] & (cells.picture[:, :, None] == cells.picture[:, None, :])
    shows = shows & (cells.used & ~cells.overview)[:, None, :]
    return jnp.einsum("bvc,bcopk->bvopk", shows.astype(tiles.dtype), parts, precision=precise)


def _cubic(distance: Array, slope: float) -> Array:
    """Keys' cubic convolution kernel with the given slope at distance 1."""
    x = jnp.abs(distance)
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = ((slope * x - 5 * slope) * x + 8 * slope) * x - 4 * slope
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def smooth_weights(
    place: Int[Array, "batch cells"], times: Int[Array, "batch cells"], side: int, *, limit: int
) -> Float[Array, "batch cells side side"]:
    """Bicubic reduction by `times` (at most `limit`), the kernel widened alike and normalized at borders (PIL's)."""
    scale = jnp.maximum(times, 1)[..., None, None].astype(jnp.float32)
    end = scale * side
    centre = (jnp.arange(side)[:, None] + 0.5) * scale

    def at(pixel: Array) -> Array:
        inside = (pixel >= 0) & (pixel < end)
        return jnp.where(inside, _cubic((pixel + 0.5 - centre) / scale, -0.5), 0.0)

    reach = jnp.floor(centre - 2 * scale) + jnp.arange(4 * limit + 1)
    return at(place[..., None, None] * side + jnp.arange(side)) / at(reach).sum(axis=-1, keepdims=True)


def sampled_weights(
    place: Int[Array, "batch cells"], times: Int[Array, "batch cells"], side: int
) -> Float[Array, "batch cells side side"]:
    """Bicubic interpolation at `times` coarser places: four taps each, the border repeated (PyTorch's)."""
    times = times[..., None]
    source = (jnp.arange(side) + 0.5) * times - 0.5
    base = jnp.floor(source).astype(jnp.int32)
    own = place[..., None, None] * side + jnp.arange(side)[None, None, None, :]
    weights = jnp.zeros((*place.shape, side, side), jnp.float32)
    for tap in (-1, 0, 1, 2):
        index = jnp.clip(base + tap, 0, times * side - 1)
        weight = _cubic(source - (base + tap), -0.75)
        weights = weights + jnp.where(index[..., None] == own, weight[..., None], 0.0)
    return weights
