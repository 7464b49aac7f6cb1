"""What cuts objects out of their boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from data_prep.unit import Box


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A mask at the picture's size, and the segmenter's estimate of its IoU (1 where it makes none)."""

    mask: Bool[np.ndarray, "height width"]
    score: float


class Segmenter(Protocol):
    """Segments the objects in boxes."""

    def __call__(self, picture: UInt8[np.ndarray, "height width 3"], boxes: list[Box]) -> list[Segmentation]:
        """A mask for each box; the picture is looked at once."""
        ...
