"""Static sizes for prompts and pictures of any length: few shapes, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

from csp_jax.data.batch import Sample, Shape, Tree

_log = logging.getLogger(__name__)
STEPS = 4  # sizes to each doubling: at most a fifth of a bucket is padding
FINER = 8  # where parts of a data set have about one size
SMALLEST = 16


def bucket(size: int, steps: int = STEPS, smallest: int = SMALLEST) -> int:
    """The smallest bucket that holds `size`: 0, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ...

    `steps` (a power of two) of them lie within each doubling.
    """
    if size <= smallest:
        return smallest if size else 0
    step = 1 << max((size - 1).bit_length() - steps.bit_length(), 0)
    return -(-size // step) * step


def fed(sample: Sample) -> int:
    """Fed tokens of the largest group; of branches that are not merged yet, their sum."""
    sizes = (
        len(group.tokens) if isinstance(group, Tree) else sum(len(branch.tokens) for branch in group)
        for group in sample.groups
    )
    return max(sizes, default=0)


def alike(samples: Sequence[Sample], rows: int) -> list[list[int]]:
    """Samples (by their numbers) in parts of `rows` that have about as many groups and tokens, the largest first."""
    sizes = [(len(sample.groups), bucket(fed(sample), FINER), len(sample.prompt)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda number: (*(-size for size in sizes[number]), number))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


class Buckets:
    """Shapes for parts of a data set, none larger than `whole`; text, canvas cells and groups are rounded up apart.

    `used` counts the batches of each shape; a shape that was not used before is logged, for it means a compilation.
    A shape serves `patience` batches that it holds before a smaller one takes its place.
    """

    def __init__(self, whole: Shape, patience: int = 0):
        self.whole, self.patience = whole, patience
        self.used: Counter[Shape] = Counter()
        self._last: Shape | None = None

    def __call__(self, samples: Sequence[Sample]) -> Shape:
        """The shape for a batch of these samples, one a row."""
        found = {
            "prompt": bucket(max(len(sample.prompt) for sample in samples)),
            "length": bucket(max(map(fed, samples)), FINER),
            "cells": bucket(max(sum(picture.cells for picture in sample.pictures) for sample in samples)),
            "groups": bucket(max(len(sample.groups) for sample in samples), FINER, smallest=1),
            "responses": bucket(max(sample.responses for sample in samples), FINER, smallest=1),
        }
        sizes = {name: min(size, getattr(self.whole, name)) for name, size in found.items()}
        shape, last = dataclasses.replace(self.whole, **sizes), self._last
        if last is not None and self.used[last] < self.patience:
            shape = last if all(size <= getattr(last, name) for name, size in sizes.items()) else shape
        self._last = shape
        if shape not in self.used:
            text = "shape %d: %d prompt tokens, %d cells, %d groups of %d a row"
            _log.info(text, len(self.used) + 1, shape.prompt, shape.cells, shape.groups, shape.length)
        self.used[shape] += 1
        return shape
