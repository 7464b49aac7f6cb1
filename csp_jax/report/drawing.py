"""Plain drawing arithmetic: scales, ticks and SVG paths, in pixels with y pointing down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Scale:
    """A linear map from data [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Tick:
    """A tick: where it stands (pixels) and what it says."""

    at: float
    text: str


def round_steps(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high] in some `about` steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(span / size - about))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def ticks(scale: Scale, values: Iterable[float]) -> list[Tick]:
    return [Tick(scale(value), f"{value:g}" if abs(value) < 1e15 else f"{value:.0e}") for value in values]


def path(points: Iterable[tuple[float, float]]) -> str:
    """An SVG path through the points (pixels); points that repeat the one before are left out."""
    kept: list[str] = []
    for x, y in points:
        text = f"{x:g},{y:g}"
        if not kept or kept[-1] != text:
            kept.append(text)
    return "M" + "L".join(kept) if kept else ""


def thinned(values: Sequence[float], limit: int) -> list[float]:
    """At most `limit` values: the means of equal stretches, so that a long curve stays a small picture."""
    if len(values) <= limit:
        return list(values)
    edges = [round(index * len(values) / limit) for index in range(limit + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over a centred window, cut at both ends."""
    half = window // 2
    stretches = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in stretches]
