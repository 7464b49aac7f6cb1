"""Masks as annotations write them, rendered at a picture's size when they are needed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.records import decode_mask


class MaskSource(Protocol):
    """A mask that can be drawn."""

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """The mask; ValueError when it does not fit the picture or cannot be read."""
        ...


@dataclass(frozen=True, eq=False)
class Pixels:
    """A mask in memory."""

    array: Bool[np.ndarray, "height width"]

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """The array; ValueError unless it has the picture's size."""
        if self.array.shape != (height, width):
            raise ValueError(f"a mask of {self.array.shape} for a picture of {height} x {width}")
        return self.array


@dataclass(frozen=True)
class Rectangle:
    """A box as a mask."""

    box: tuple[float, float, float, float]

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """True on pixels whose corner lies inside the rounded box."""
        x0, y0, x1, y1 = (max(0, round(edge)) for edge in self.box)
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = True
        return mask


@dataclass(frozen=True)
class Polygons:
    """COCO's outlines: flat lists x, y, x, y, ... whose union is the object."""

    outlines: tuple[tuple[float, ...], ...]

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """True on pixels whose centre an outline encloses (even-odd)."""
        mask = np.zeros((height, width), bool)
        for outline in self.outlines:
            if len(outline) < 6 or len(outline) % 2 or not np.isfinite(outline).all():
                raise ValueError(f"an outline of {len(outline)} numbers that cannot be drawn")
            mask |= _fill(np.array(outline, float).reshape(-1, 2), height, width)
        return mask


def _fill(corners: Float[np.ndarray, "corners 2"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Every row of pixel centres changes sides where an edge crosses it."""
    changes = np.zeros((height, width + 1), np.int64)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        if y0 == y1:
            continue
        low, high = sorted((y0, y1))
        rows = np.arange(max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5))))
        crossings = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
        np.add.at(changes, (rows, columns), 1)
    return (np.cumsum(changes, axis=1)[:, :width] % 2).astype(bool)


@dataclass(frozen=True)
class ColumnRuns:
    """COCO's run lengths: columns first, the first run counts zeros."""

    counts: tuple[int, ...]
    height: int
    width: int

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """The mask; ValueError unless the runs fill the picture exactly."""
        if (self.height, self.width) != (height, width):
            raise ValueError(f"a mask of {self.height} x {self.width} for a picture of {height} x {width}")
        try:
            return decode_mask(np.array(self.counts, np.uint32), width, height).T
        except UserError as error:
            raise ValueError(error.problem) from None


@dataclass(frozen=True, eq=False)
class RowRuns:
    """A record's own run lengths: rows first, the first run counts zeros."""

    runs: np.ndarray

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """The mask; ValueError unless the runs fill the picture exactly."""
        try:
            return decode_mask(self.runs, height, width)
        except UserError as error:
            raise ValueError(error.problem) from None


@dataclass(frozen=True)
class MaskFile:
    """A mask as a picture file: what is brighter than half, or more than half opaque, is the object."""

    path: Path

    def render(self, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """The mask; ValueError when it is missing, unreadable or of another size."""
        try:
            picture = Image.open(io.BytesIO(self.path.read_bytes()))
            plane = picture.getchannel("A") if "A" in picture.getbands() else picture.convert("L")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.path.name}: the mask cannot be read ({error})") from None
        if plane.size != (width, height):
            raise ValueError(f"{self.path.name}: {plane.height} x {plane.width} for a picture of {height} x {width}")
        return np.asarray(plane) >= 128


def coco_segmentation(value: object, height: int, width: int) -> MaskSource:
    """The `segmentation` of a COCO annotation: polygons, plain run lengths or COCO's compressed text.

    ValueError when it is none of them.
    """
    if isinstance(value, list) and value and all(isinstance(outline, list) for outline in value):
        return Polygons(tuple(tuple(float(number) for number in outline) for outline in value))
    if isinstance(value, dict) and "counts" in value:
        size = value.get("size", [height, width])
        counts = value["counts"]
        if isinstance(counts, str | bytes):
            counts = uncompress_runs(counts if isinstance(counts, bytes) else counts.encode("ascii"))
        return ColumnRuns(tuple(int(count) for count in counts), int(size[0]), int(size[1]))
    raise ValueError("a segmentation is a list of outlines or an object with counts")


def uncompress_runs(text: bytes) -> list[int]:
    """COCO's compressed run lengths: five bits a character from 48 up, the sixth says that more follow.

    Numbers are signed; from the fourth on each is the difference to the one two places before.
    """
    runs: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        while True:
            if place == len(text):
                raise ValueError("compressed run lengths end within a number")
            bits = text[place] - 48
            value |= (bits & 31) << shift
            shift += 5
            place += 1
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
