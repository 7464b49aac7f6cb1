"""A checkpoint's layout as data: which hub tensors fill which leaf of ours, and how they are turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a hub tensor becomes a leaf of ours, and back (`hub_shape` gives what the reverse needs)."""

    name: str
    from_hub: Callable[[np.ndarray], np.ndarray]
    to_hub: Callable[[np.ndarray], np.ndarray]


def _conv_from(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _conv_to(x: np.ndarray) -> np.ndarray:
    size = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(size, size, 3, x.shape[1]).transpose(3, 2, 0, 1)


def _frames_from(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _frames_to(x: np.ndarray) -> np.ndarray:
    size = round((x.shape[0] // 6) ** 0.5)
    return x.reshape(2, size, size, 3, x.shape[1]).transpose(4, 3, 0, 1, 2)


def leading(count: int) -> Transform:
    """A leaf that the hub stores with `count` leading axes of size 1."""
    return Transform(
        f"leading {count}", lambda x: x.reshape(x.shape[count:]), lambda x: x.reshape((1,) * count + x.shape)
    )


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", lambda x: x.T, lambda x: x.T)
CONV = Transform("conv", _conv_from, _conv_to)  # [out, 3, size, size] <-> [size * size * 3, out]
FRAMES = Transform("frames", _frames_from, _frames_to)  # [out, 3, 2, size, size] <-> [2 * size * size * 3, out]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a fused hub tensor are a leaf's: of its rows seen as [blocks, width], `start`..`stop` of each."""

    blocks: int
    width: int
    start: int
    stop: int

    def take(self, fused: np.ndarray) -> np.ndarray:
        parts = fused.reshape(self.blocks, self.width, *fused.shape[1:])[:, self.start : self.stop]
        return parts.reshape(-1, *fused.shape[1:])

    def put(self, fused: np.ndarray, part: np.ndarray) -> None:
        blocks = fused.reshape(self.blocks, self.width, *fused.shape[1:])
        blocks[:, self.start : self.stop] = part.reshape(self.blocks, self.stop - self.start, *fused.shape[1:])


def split_rows(blocks: int, *sizes: int) -> list[Rows]:
    """Consecutive parts of each block of a fused tensor."""
    ends = np.cumsum(sizes).tolist()
    return [Rows(blocks, ends[-1], end - size, end) for end, size in zip(ends, sizes)]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of ours: the hub keys it is made of (several: stacked on a layer axis) and how.

    `rows`: the leaf is a part of a fused hub tensor; the other parts belong to other leaves.
    """

    path: str
    keys: tuple[str, ...]
    transform: Transform
    stacked: bool = False
    rows: Rows | None = None


def norm(path: str, key: str) -> list[Tensor]:
    """A layer norm's two vectors."""
    return [Tensor(f"{path}.scale", (f"{key}.weight",), SAME), Tensor(f"{path}.bias", (f"{key}.bias",), SAME)]


def linear(path: str, key: str, *, bias: bool = True) -> list[Tensor]:
    """A linear layer's kernel, and its bias."""
    kernel = Tensor(f"{path}.kernel", (f"{key}.weight",), TRANSPOSE)
    return [kernel, Tensor(f"{path}.bias", (f"{key}.bias",), SAME)] if bias else [kernel]


def fused(paths: Sequence[str], key: str, rows: Sequence[Rows], *, bias: bool = False) -> list[Tensor]:
    """Linear layers whose rows the hub keeps in one tensor."""
    return [
        dataclasses.replace(tensor, rows=part)
        for path, part in zip(paths, rows, strict=True)
        for tensor in linear(path, key, bias=bias)
    ]


def layer_tensors(path: str, key: str, layer: list[Tensor], numbers: range | int) -> list[Tensor]:
    """A layer's tensors for a stack of layers (`numbers` a range) or for one layer that stands alone."""
    stacked = isinstance(numbers, range)
    every = numbers if isinstance(numbers, range) else [numbers]
    if len(every) == 0:
        return []
    return [
        dataclasses.replace(
            tensor,
            path=f"{path}.{tensor.path}",
            keys=tuple(f"{key.format(n=n)}.{tensor.keys[0]}" for n in every),
            stacked=stacked,
        )
        for tensor in layer
    ]
