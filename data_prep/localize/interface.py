"""What finds boxes. Any detector with this one call fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from data_prep.unit import Box


@dataclass(frozen=True)
class Detection:
    """One box, with the detector's score in [0, 1]."""

    box: Box
    score: float


class Detector(Protocol):
    """Finds named objects in pictures."""

    def __call__(
        self, pictures: list[UInt8[np.ndarray, "height width 3"]], keywords: list[str]
    ) -> list[list[Detection]]:
        """The boxes of `keywords[i]` in `pictures[i]`, in pixels of that picture; pictures may repeat."""
        ...
