"""Which samples share a row, and which of the row's groups holds each of their trees.

A batch is as long as its fullest row, so what counts is that rows are alike: the largest samples first, each to the
row that makes the batch grow least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from csp_jax.data.batch import Batch, Packer, Place, Sample, Shape, Tree, merge_branches, refuse_what_never_fits
from csp_jax.data.buckets import FINER, bucket


@dataclasses.dataclass(frozen=True)
class Home:
    """A sample's row, and the group of each of its trees."""

    row: int
    groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Load:
    """A sample with its trees merged, and what it takes of a row."""

    sample: Sample
    trees: tuple[Tree, ...]

    @classmethod
    def of(cls, sample: Sample) -> Load:
        """The load of a sample."""
        trees = (group if isinstance(group, Tree) else merge_branches(group) for group in sample.groups)
        return cls(sample, tuple(trees))

    @property
    def largest(self) -> int:
        """Fed tokens of its largest tree."""
        return max((len(tree.tokens) for tree in self.trees), default=0)

    @property
    def need(self) -> tuple[int, int, int, int, int]:
        """Prompt tokens, fed tokens, responses, pictures, cells."""
        fed = sum(len(tree.tokens) for tree in self.trees)
        cells = sum(picture.cells for picture in self.sample.pictures)
        return len(self.sample.prompt), fed, self.sample.responses, len(self.sample.pictures), cells


def arrange(loads: Sequence[Load], shape: Shape, rows: int) -> list[Home | None]:
    """Where each sample goes in so many rows of a shape; None where it finds no room. Depends on nothing else."""
    limits = np.array(
        [shape.prompt, shape.groups * shape.length, shape.responses, shape.pictures, shape.cells or shape.pictures]
    )
    need = np.array([load.need for load in loads]).reshape(-1, len(limits))
    used = np.zeros((rows, len(limits)), int)
    members: list[list[int]] = [[] for _ in range(rows)]
    for number in sorted(range(len(loads)), key=lambda number: (-need[number, :2].sum(), number)):
        after = used + need[number]
        fits = (after <= limits).all(axis=1)
        growth = np.maximum(after[:, :2] - used[:, :2].max(axis=0), 0).sum(axis=1)
        row = int(np.lexsort((np.arange(rows), used[:, :2].sum(axis=1), growth, ~fits))[0])
        if fits[row]:
            used[row] = after[row]
            members[row].append(number)
    homes: list[Home | None] = [None] * len(loads)
    for row, own in enumerate(members):
        filled = np.zeros((shape.groups, 2), int)
        for number in sorted(own, key=lambda number: (-loads[number].largest, number)):
            groups = _place_trees(loads[number].trees, filled, (shape.length, shape.targets))
            homes[number] = None if groups is None else Home(row, groups)
    return homes


def _place_trees(trees: Sequence[Tree], filled: np.ndarray, limits: tuple[int, int]) -> tuple[int, ...] | None:
    """Each tree to the emptiest group that holds it, the largest first; `filled` is what groups hold, and is updated.
    None, and nothing is placed, where one finds no room.
    """
    before, groups = filled.copy(), [0] * len(trees)
    for number in sorted(range(len(trees)), key=lambda number: (-len(trees[number].tokens), number)):
        after = filled + np.array([len(trees[number].tokens), len(trees[number].targets)])
        fits = (after <= limits).all(axis=1)
        if not fits.any():
            filled[:] = before
            return None
        group = int(np.argmin(np.where(fits, filled[:, 0], np.iinfo(int).max)))
        filled[group], groups[number] = after[group], group
    return tuple(groups)


def tight(loads: Sequence[Load], homes: Sequence[Home | None], shape: Shape) -> Shape:
    """The smallest shape, of few, that holds what was arranged; `shape` itself where that is nothing."""
    prompts: dict[int, int] = {}
    groups: dict[tuple[int, int], np.ndarray] = {}
    for load, home in zip(loads, homes, strict=True):
        if home is None:
            continue
        prompts[home.row] = prompts.get(home.row, 0) + len(load.sample.prompt)
        for tree, group in zip(load.trees, home.groups, strict=True):
            held = groups.get((home.row, group), np.zeros(2, int))
            groups[home.row, group] = held + np.array([len(tree.tokens), len(tree.targets)])
    if not groups:
        return shape
    fed, scored = np.max(list(groups.values()), axis=0)
    return dataclasses.replace(
        shape,
        prompt=min(bucket(max(prompts.values()), FINER), shape.prompt),
        length=min(bucket(max(int(fed), 1), FINER), shape.length),
        targets=min(bucket(int(scored)), shape.targets),
    )


def pack(
    samples: Sequence[Sample], shape: Shape, batches: int, *, whole: bool = False
) -> tuple[list[Batch], list[Place | None]]:
    """So many batches of one shape, and where each sample is: its row over all of them; None: it found no room.

    `shape` is the largest that they take; `whole`: take it as it is. UserError names a size that never holds a sample.
    """
    loads = [Load.of(sample) for sample in samples]
    for load in loads:
        refuse_what_never_fits(load.sample, load.trees, shape, groups=min(len(load.trees), 1))
    homes = arrange(loads, shape, shape.rows * batches)
    shape = shape if whole else tight(loads, homes, shape)
    packers = [Packer(shape) for _ in range(batches)]
    places: list[Place | None] = [None] * len(samples)
    for number, (load, home) in enumerate(zip(loads, homes, strict=True)):
        if home is not None:
            batch, row = divmod(home.row, shape.rows)
            place = packers[batch].put(load.sample, load.trees, row, home.groups)
            places[number] = dataclasses.replace(place, row=home.row)
    return [packer.batch for packer in packers], places
