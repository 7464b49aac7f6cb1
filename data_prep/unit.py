"""What flows through the stages: a unit is one picture with questions about it, and becomes one record."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from csp_jax.records import Item
from data_prep.masks import MaskSource

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the upright picture, half-open


class ImageSource(Protocol):
    """Where an encoded picture lies; read when its unit's turn has come."""

    def read(self) -> bytes:
        """The encoded file; OSError when it cannot be had."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk."""

    path: Path

    def read(self) -> bytes:
        """The file."""
        return self.path.read_bytes()


@dataclass(frozen=True)
class ImageBytes:
    """A picture that the source holds already."""

    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class Reject:
    """A row that no record holds: where it stood, at which stage it fell out, and why."""

    where: str
    id: str
    stage: str
    reason: str  # one word of a closed list, to be counted
    detail: str = ""


@dataclass
class Region:
    """A key-object region on its way: `mask` is None until it is segmented."""

    keyword: str
    box: Box
    score: float = 1.0
    mask: MaskSource | None = None
    mask_score: float = 1.0  # the segmenter's own estimate of its mask's IoU
    origin: str = "annotation"  # annotation, detector or whole


@dataclass(frozen=True)
class Row:
    """One usable row of a source. `item.regions` index `regions`, the ones that the source itself knows."""

    where: str
    image_id: str
    image: ImageSource
    item: Item
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that the source cannot use."""

    where: str
    reason: str
    detail: str = ""
    id: str = ""


@dataclass(frozen=True)
class Merged:
    """A row whose question an earlier row holds (the same question in another subset)."""

    where: str


@dataclass
class Unit:
    """One picture and its questions; each stage adds what it found, or moves questions to `rejects`.

    `number` is the unit's place in the source's order, `rows` how many source rows went into it. Every row is
    packed, rejected or merged: `rows == questions packed + rejects + merged`.
    """

    number: int
    key: str
    image_id: str
    image: ImageSource | None
    rows: int
    items: list[Item] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)  # item id -> its row
    regions: list[Region] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    merged: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    encoded: bytes = b""
    picture: UInt8[np.ndarray, "height width 3"] | None = None
    shape: tuple[int, int] = (0, 0)
    made: list[Item] = field(default_factory=list)  # the perturbed items of a materialized set

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the decoded picture, also after its pixels are let go."""
        return self.shape if self.picture is None else (self.picture.shape[0], self.picture.shape[1])

    def reject(self, item: Item, stage: str, reason: str, detail: str = "") -> None:
        """Move one question to the rejects."""
        self.items.remove(item)
        self.rejects.append(Reject(self.where[item.id], item.id, stage, reason, detail))

    def reject_all(self, stage: str, reason: str, detail: str = "") -> None:
        """Move every question to the rejects: the picture itself cannot be used."""
        for item in list(self.items):
            self.reject(item, stage, reason, detail)

    def replace(self, item: Item, **changes: object) -> Item:
        """Put a changed question in the place of `item`."""
        changed = dataclasses.replace(item, **changes)  # type: ignore[arg-type]
        self.items[self.items.index(item)] = changed
        return changed

    def mask(self, index: int) -> Bool[np.ndarray, "height width"]:
        """The mask of one region at the picture's size."""
        source = self.regions[index].mask
        assert source is not None
        return source.render(*self.size)


class Stage(Protocol):
    """One step of the preparation; changes the units of a batch in place. Batches depend on the source alone."""

    name: str

    def __call__(self, batch: list[Unit]) -> None:
        """Do the step for every unit that still has questions."""
        ...
