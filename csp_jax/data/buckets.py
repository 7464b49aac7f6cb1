"""Static sizes for prompts and pictures of any length: few shapes, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

from csp_jax.data.batch import Sample, Shape

_log = logging.getLogger(__name__)
STEPS = 4  # sizes to each doubling: at most a fifth of a bucket is padding
SMALLEST = 16


def bucket(size: int) -> int:
    """The smallest bucket that holds `size`: 0, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ..."""
    if size <= SMALLEST:
        return SMALLEST if size else 0
    step = 1 << (size - 1).bit_length() - STEPS.bit_length()
    return -(-size // step) * step


class Buckets:
    """Shapes for parts of a data set, none larger than `whole`; text and canvas cells are rounded up apart.

    `used` counts the batches of each shape; a shape that was not used before is logged, for it means a compilation.
    """

    def __init__(self, whole: Shape):
        self.whole = whole
        self.used: Counter[Shape] = Counter()

    def __call__(self, samples: Sequence[Sample]) -> Shape:
        """The shape for a batch of these samples, one a row."""
        prompt = bucket(max(len(sample.prompt) for sample in samples))
        cells = bucket(max(sum(picture.cells for picture in sample.pictures) for sample in samples))
        shape = dataclasses.replace(
            self.whole, prompt=min(prompt, self.whole.prompt), cells=min(cells, self.whole.cells)
        )
        if shape not in self.used:
            _log.info("shape %d: %d prompt tokens, %d cells a row", len(self.used) + 1, shape.prompt, shape.cells)
        self.used[shape] += 1
        return shape
