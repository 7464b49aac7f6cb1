"""What can be seen in a rendered scene, measured on the visible masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from csp_jax.world.catalogue import ObjectClass
from csp_jax.world.config import WorldConfig
from csp_jax.world.scene import Scene


@dataclass(frozen=True, eq=False)
class Thing:
    """One visible object; lengths in pixels, `box` half-open."""

    region: int
    place: int
    index: int  # of its class
    name: str
    plural: str
    size: str  # "small", "large", or "" where that is no clear case
    mask: np.ndarray
    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    centroid: tuple[float, float]


def gap(first: Thing, second: Thing) -> int:
    """Free pixels between two boxes on the axis where they are further apart (negative: they overlap)."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    return max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1)


def offset(first: Thing, second: Thing, axis: int) -> float:
    """How far `second` lies right of (axis 0) or below (axis 1) `first`.

    The lesser of the differences of box centres and of mask centroids; 0 where the two disagree in sign.
    """
    by_box, by_mask = second.centre[axis] - first.centre[axis], second.centroid[axis] - first.centroid[axis]
    if by_box * by_mask <= 0:
        return 0.0
    return min(by_box, by_mask, key=abs)


class Facts:
    """The things of a scene, and which of them questions may be asked about."""

    def __init__(self, config: WorldConfig, classes: Sequence[ObjectClass], scene: Scene):
        self.plan = scene.plan
        self.canvas = config.canvas
        self.things: list[Thing] = []
        for region, (placed, mask) in enumerate(zip(scene.objects, scene.visible_masks())):
            x0, y0, x1, y1 = placed.box
            part = mask[y0:y1, x0:x1]
            columns, rows = part.sum(0), part.sum(1)
            xs, ys = np.flatnonzero(columns), np.flatnonzero(rows)
            left, top, right, bottom = (
                x0 + int(xs[0]),
                y0 + int(ys[0]),
                x0 + int(xs[-1]) + 1,
                y0 + int(ys[-1]) + 1,
            )
            total = float(columns.sum())
            index = self.plan.classes[placed.sprite.place]
            self.things.append(
                Thing(
                    region=region,
                    place=placed.sprite.place,
                    index=index,
                    name=classes[index].name,
                    plural=classes[index].plural,
                    size=_clear_size(config, placed.sprite.size, max(right - left, bottom - top)),
                    mask=mask,
                    box=(left, top, right, bottom),
                    centre=((left + right) / 2, (top + bottom) / 2),
                    centroid=(
                        x0 + 0.5 + float(columns @ np.arange(len(columns))) / total,
                        y0 + 0.5 + float(rows @ np.arange(len(rows))) / total,
                    ),
                )
            )

    @cached_property
    def singles(self) -> list[Thing]:
        """Things that are the only one of their class."""
        return [thing for thing in self.things if self.plan.counts[thing.place] == 1]

    def of_place(self, place: int) -> list[Thing]:
        """The instances of the class at this place of the plan."""
        return [thing for thing in self.things if thing.place == place]


def _clear_size(config: WorldConfig, meant: str, side: int) -> str:
    clear = (meant == "small" and side <= config.small[1]) or (meant == "large" and side >= config.large[0])
    return meant if clear else ""
