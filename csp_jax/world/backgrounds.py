"""Procedural backgrounds; some kinds never appear in training splits."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np
from PIL import Image

Array = np.ndarray
TRAIN_KINDS = (
    "plain", "gradient", "glow", "stripes", "checker", "dots", "blobs", "bricks", "waves", "grain", "plaid",
)  # fmt: skip
HELD_OUT_KINDS = ("rings", "zigzag", "patches", "clouds", "rays")


class BackgroundSource(Protocol):
    """Where backgrounds come from; `held_out` asks for those that training never shows."""

    def paint(self, rng: np.random.Generator, held_out: bool) -> Array:
        """A uint8 [canvas, canvas, 3] picture."""
        ...


def _colours(rng: np.random.Generator) -> Array:
    """Two colours, float32 [2, 3] in 0..255: muted, and not too far apart, so that objects stand out."""
    hue, saturation, value, turn, step, sign = rng.random(6)
    value = 0.35 + 0.6 * value
    contrast = 0.08 + 0.22 * step
    other = value + contrast if (sign < 0.5 or value - contrast < 0.2) else value - contrast
    first = colorsys.hsv_to_rgb(hue, 0.1 + 0.5 * saturation, value)
    second = colorsys.hsv_to_rgb((hue + 0.3 * (turn - 0.5)) % 1.0, 0.1 + 0.5 * saturation, min(other, 1.0))
    return np.asarray((first, second), np.float32) * 255


class ProceduralBackgrounds:
    """Patterns of two colours: a blend in [0, 1] per pixel, one method per kind."""

    def __init__(self, canvas: int):
        self.canvas = canvas
        axis = np.arange(canvas, dtype=np.float32)
        self._y, self._x = np.meshgrid(axis, axis, indexing="ij")

    @cached_property
    def _kinds(self) -> dict[str, Callable[[np.random.Generator], Array]]:
        return {kind: getattr(self, f"_{kind}") for kind in (*TRAIN_KINDS, *HELD_OUT_KINDS)}

    def kind(self, rng: np.random.Generator, held_out: bool) -> str:
        """Draws the name of a background kind."""
        kinds = HELD_OUT_KINDS if held_out else TRAIN_KINDS
        return kinds[int(rng.random() * len(kinds))]

    def paint(self, rng: np.random.Generator, held_out: bool) -> Array:
        """A uint8 [canvas, canvas, 3] picture of a random kind."""
        return self.paint_kind(self.kind(rng, held_out), rng)

    def paint_kind(self, kind: str, rng: np.random.Generator) -> Array:
        """A uint8 [canvas, canvas, 3] picture of one kind, with random colours and geometry."""
        first, second = _colours(rng)
        blend = self._kinds[kind](rng).astype(np.float32)
        return (first + blend[..., None] * (second - first)).astype(np.uint8)

    def _direction(self, rng: np.random.Generator) -> Array:
        angle = 2 * np.pi * rng.random()
        return np.float32(np.cos(angle)) * self._x + np.float32(np.sin(angle)) * self._y

    def _centre_distance(self, rng: np.random.Generator) -> Array:
        x, y = rng.random(2) * self.canvas
        return np.hypot(self._x - np.float32(x), self._y - np.float32(y))

    def _noise(self, rng: np.random.Generator, cells: int) -> Array:
        """Smooth noise in [0, 1] with `cells` features a side."""
        coarse = Image.fromarray(rng.random((cells + 2, cells + 2), dtype=np.float32))
        return np.clip(np.asarray(coarse.resize((self.canvas, self.canvas), Image.Resampling.BICUBIC)), 0, 1)

    def _plain(self, rng: np.random.Generator) -> Array:
        return np.zeros_like(self._x)

    def _gradient(self, rng: np.random.Generator) -> Array:
        ramp = self._direction(rng)
        low = ramp.min()
        return (ramp - low) / (ramp.max() - low)

    def _glow(self, rng: np.random.Generator) -> Array:
        return np.clip(self._centre_distance(rng) / np.float32(self.canvas * 0.8), 0, 1)

    def _stripes(self, rng: np.random.Generator) -> Array:
        return np.mod(self._direction(rng) / np.float32(rng.uniform(5, 14)), 1) < 0.5

    def _checker(self, rng: np.random.Generator) -> Array:
        side, shift = np.float32(rng.uniform(6, 16)), np.float32(rng.uniform(0, 16))
        return (np.floor((self._x + shift) / side) + np.floor((self._y + shift) / side)) % 2

    def _dots(self, rng: np.random.Generator) -> Array:
        pitch = np.float32(rng.uniform(8, 16))
        radius = pitch * np.float32(rng.uniform(0.18, 0.35))
        x, y = np.mod(self._x, pitch) - pitch / 2, np.mod(self._y, pitch) - pitch / 2
        return x * x + y * y < radius * radius

    def _blobs(self, rng: np.random.Generator) -> Array:
        return self._noise(rng, int(rng.integers(3, 7))) > 0.5

    def _bricks(self, rng: np.random.Generator) -> Array:
        height = np.float32(rng.uniform(6, 12))
        width = 2 * height
        row = np.floor(self._y / height)
        return (np.mod(self._y, height) < 1) | (np.mod(self._x + row % 2 * height, width) < 1)

    def _waves(self, rng: np.random.Generator) -> Array:
        period, amplitude, length = rng.uniform(8, 16), rng.uniform(2, 6), rng.uniform(15, 40)
        bent = self._y + np.float32(amplitude) * np.sin(self._x * np.float32(2 * np.pi / length))
        return np.mod(bent / np.float32(period), 1) < 0.5

    def _grain(self, rng: np.random.Generator) -> Array:
        return rng.random(self._x.shape, dtype=np.float32)

    def _plaid(self, rng: np.random.Generator) -> Array:
        pitch, share = np.float32(rng.uniform(10, 20)), np.float32(rng.uniform(0.25, 0.6))
        vertical = np.mod(self._x, pitch) < share * pitch
        return (vertical.astype(np.float32) + (np.mod(self._y, pitch) < share * pitch)) / 2

    def _rings(self, rng: np.random.Generator) -> Array:
        return np.mod(self._centre_distance(rng) / np.float32(rng.uniform(8, 16)), 1) < 0.5

    def _zigzag(self, rng: np.random.Generator) -> Array:
        period, length = np.float32(rng.uniform(8, 16)), np.float32(rng.uniform(10, 24))
        bent = self._y + np.abs(np.mod(self._x, length) - length / 2)
        return np.mod(bent / period, 1) < 0.5

    def _patches(self, rng: np.random.Generator) -> Array:
        points = rng.random((12, 2)).astype(np.float32) * self.canvas
        shades = rng.random(12, dtype=np.float32)
        squared = (self._x[..., None] - points[:, 0]) ** 2 + (self._y[..., None] - points[:, 1]) ** 2
        return shades[squared.argmin(-1)]

    def _clouds(self, rng: np.random.Generator) -> Array:
        return (4 * self._noise(rng, 3) + 2 * self._noise(rng, 8) + self._noise(rng, 18)) / 7

    def _rays(self, rng: np.random.Generator) -> Array:
        x, y = rng.random(2) * self.canvas
        angle = np.arctan2(self._y - np.float32(y), self._x - np.float32(x))
        return np.mod(angle * np.float32(rng.integers(6, 13) / (2 * np.pi)), 1) < 0.5
