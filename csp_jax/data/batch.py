"""One prompt and its branches: the one batch that every stage trains on and every evaluation scores.

A row holds the prompts of one or more samples (segments) with their pictures, and `groups` trees of branch
tokens. Tokens that are fed and tokens that are scored are kept apart: `tokens` are read by the model,
`target_token` are predicted from the hidden state at `target_parent`. So a query shared by several answers is
fed once, the last token of an answer (which nothing follows) is never fed, and head and last layer see scored
slots only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, UInt8

from csp_jax.errors import UserError

UNUSED, PLAIN, CHOSEN, REJECTED = 0, 1, 2, 3  # roles of responses; a rejected one follows its chosen one
SLOT_NAMES = 6  # words that may name a picture slot
CELL_STRIDE = 0x9E3779B1  # between the noise identities of a picture's cells; odd, so that no two are alike


@dataclasses.dataclass(frozen=True)
class Picture:
    """A canvas, the region under noise, the confidence that says how much, and the noise's identity.

    `cell`: the size of the blocks that the canvas is cut into, in reading order (None: it is one block);
    `overview`: one more block, a view of the whole picture that follows them (see `families.interface`).
    """

    canvas: UInt8[np.ndarray, "rows columns 3"]
    mask: Bool[np.ndarray, "rows columns"]
    confidence: float = 100.0
    noise_id: int = 0
    cell: tuple[int, int] | None = None
    overview: UInt8[np.ndarray, "cell_rows cell_columns 3"] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        height, width = self.cell or self.canvas.shape[:2]
        return self.canvas.shape[0] // height, self.canvas.shape[1] // width

    @property
    def cells(self) -> int:
        """Blocks, the overview included."""
        return self.grid[0] * self.grid[1] + (self.overview is not None)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A continuation of the prompt: tokens, each token's weight as a target (0: only fed), and its role."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    role: int = PLAIN


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with its pictures and groups of branches; branches of a group share what they begin with.
    A group may also come as a tree that is merged already (one response).

    `slot_names`: (prompt index, tokens) of picture slots that are to be named (see `losses.grounding`).
    """

    prompt: tuple[int, ...]
    pictures: tuple[Picture, ...]
    groups: tuple[tuple[Branch, ...] | Tree, ...]
    slot_names: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def responses(self) -> int:
        """How many there are: a branch is one, and so is a merged tree."""
        return sum(len(_roles(group)) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a batch: few shapes, few compilations."""

    rows: int
    prompt: int
    groups: int
    length: int  # fed tokens of a group
    targets: int  # scored tokens of a group
    responses: int  # of a row
    pictures: int  # of a row
    canvas: tuple[int, int] | None  # of one cell: a whole canvas, a tile or a patch, as the family has it
    cells: int = 0  # canvas cells of a row, all pictures together; 0: one a picture
    choices: int = 0  # tokens that are weighed at a target's place, where an evaluation weighs several


@dataclasses.dataclass
class Batch:
    """Arrays of one batch (numpy on the host, jax on the device). Parents index prompt then branch tokens."""

    prompt_tokens: Any  # Int[rows prompt]
    prompt_segment: Any  # Int[rows prompt], 0 is padding
    slot_name: Any  # Int[rows prompt names], the tokens that name a picture slot, -1 where there is none
    tokens: Any  # Int[rows groups*length]
    parent: Any  # Int[rows groups*length]
    target_token: Any  # Int[rows groups*targets]
    target_parent: Any  # Int[rows groups*targets]
    target_weight: Any  # Float[rows groups*targets]
    target_response: Any  # Int[rows groups*targets]
    role: Any  # Int[rows responses]
    canvas: Any  # UInt8[rows cells height width 3], or None
    mask: Any  # Bool[rows cells height width], or None
    confidence: Any  # Float[rows cells] percent
    noise_id: Any  # UInt32[rows cells]
    groups: int
    grid: Any = None  # Int[rows pictures 2], rows and columns of each picture's cells; 0 is padding
    choices: Any = None  # Int[rows groups*targets choices], weighed in place of the target's token alone
    # Of sampled responses; see `losses.grpo`. None where they are not needed.
    old_log_probs: Any = None  # Float[rows groups*targets] of the policy that sampled
    reference_log_probs: Any = None  # Float[rows groups*targets]
    advantage: Any = None  # Float[rows responses]
    response_weight: Any = None  # Float[rows responses], 0: counted and not trained on

    ARRAYS: ClassVar[tuple[str, ...]] = (
        "prompt_tokens",
        "prompt_segment",
        "slot_name",
        "tokens",
        "parent",
        "target_token",
        "target_parent",
        "target_weight",
        "target_response",
        "role",
        "canvas",
        "mask",
        "confidence",
        "noise_id",
        "grid",
    )
    EVALUATION: ClassVar[tuple[str, ...]] = ("choices",)
    POLICY: ClassVar[tuple[str, ...]] = ("old_log_probs", "reference_log_probs", "advantage", "response_weight")
    STATIC: ClassVar[tuple[str, ...]] = ("groups",)


@dataclasses.dataclass
class Tree:
    """Branches merged where they begin alike. Parents index `tokens`; -1 is the prompt's last token.

    `choices`: in evaluation, the tokens that are weighed at each target's place.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    parents: list[int] = dataclasses.field(default_factory=list)
    targets: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    choices: list[list[int]] = dataclasses.field(default_factory=list)


def merge_branches(branches: Sequence[Branch]) -> Tree:
    """The prefix tree of a group; targets are (token, parent, weight, branch number) in branch order."""
    tree = Tree()
    children: dict[tuple[int, int], int] = {}
    for number, branch in enumerate(branches):
        node = -1
        for position, (token, weight) in enumerate(zip(branch.tokens, branch.weights, strict=True)):
            if weight:
                tree.targets.append((token, node, weight, number))
            if position == len(branch.tokens) - 1:
                break  # nothing follows: never fed
            if (node, token) not in children:
                children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
            node = children[node, token]
    return tree


def _roles(group: tuple[Branch, ...] | Tree) -> list[int]:
    return [PLAIN] if isinstance(group, Tree) else [branch.role for branch in group]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sample ended up: its row, its first group and its first response."""

    row: int
    group: int
    response: int


def cut(canvas: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[height, width, ...] -> [cells, cell height, cell width, ...] in reading order."""
    (rows, columns), (height, width, *rest) = grid, canvas.shape
    blocks = canvas.reshape(rows, height // rows, columns, width // columns, *rest)
    return blocks.swapaxes(1, 2).reshape(rows * columns, height // rows, width // columns, *rest)


class BatchOverflow(UserError):
    """A sample that does not fit the shape at all."""


def empty_batch(shape: Shape) -> Batch:
    """All padding."""

    def zeros(*sizes: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((shape.rows, *sizes), dtype)

    fed, scored = shape.groups * shape.length, shape.groups * shape.targets
    cells = (shape.cells or shape.pictures) if shape.canvas else 0
    canvas = zeros(cells, *shape.canvas, 3, dtype=np.uint8) if shape.canvas else None
    mask = zeros(cells, *shape.canvas, dtype=bool) if shape.canvas else None
    return Batch(
        prompt_tokens=zeros(shape.prompt),
        prompt_segment=zeros(shape.prompt),
        slot_name=np.full((shape.rows, shape.prompt, SLOT_NAMES), -1, np.int32),
        tokens=zeros(fed),
        parent=zeros(fed),
        target_token=zeros(scored),
        target_parent=zeros(scored),
        target_weight=zeros(scored, dtype=np.float32),
        target_response=zeros(scored),
        role=zeros(shape.responses),
        canvas=canvas,
        mask=mask,
        confidence=np.full((shape.rows, cells), 100.0, np.float32),
        noise_id=zeros(cells, dtype=np.uint32),
        groups=shape.groups,
        grid=zeros(shape.pictures if shape.canvas else 0, 2),
        choices=zeros(scored, shape.choices) if shape.choices else None,
    )


def with_policy(batch: Batch) -> Batch:
    """The batch with zeros for what sampled responses bring."""
    targets, responses = batch.target_token.shape, batch.role.shape
    return dataclasses.replace(
        batch,
        old_log_probs=np.zeros(targets, np.float32),
        reference_log_probs=np.zeros(targets, np.float32),
        advantage=np.zeros(responses, np.float32),
        response_weight=np.zeros(responses, np.float32),
    )


def refuse_what_never_fits(sample: Sample, trees: Sequence[Tree], shape: Shape, *, groups: int) -> None:
    """BatchOverflow names the size that is too small for the sample even in an empty row, in so many groups."""
    needs = {
        "prompt": (len(sample.prompt), shape.prompt),
        "groups": (groups, shape.groups),
        "responses": (sample.responses, shape.responses),
        "pictures": (len(sample.pictures), shape.pictures),
        "cells": (sum(picture.cells for picture in sample.pictures), shape.cells or shape.pictures),
        "length": (max((len(tree.tokens) for tree in trees), default=0), shape.length),
        "targets": (max((len(tree.targets) for tree in trees), default=0), shape.targets),
        "choices": (max((len(tokens) for tree in trees for tokens in tree.choices), default=0), shape.choices),
    }
    for name, (has, limit) in needs.items():
        if has > limit:
            raise BatchOverflow(
                f"a sample needs {has}", field=f"shape.{name}", value=limit, mend=f"Set it to {has} or more"
            )
    for picture in sample.pictures:
        cell = picture.cell or picture.canvas.shape[:2]
        if cell != shape.canvas:
            raise BatchOverflow(f"a picture has {cell}", field="shape.canvas", value=shape.canvas)


class Packer:
    """Fills one batch with samples; several may share a row, each its own segment."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.batch = empty_batch(shape)
        self._used = np.zeros((shape.rows, 6), int)  # prompt, groups, responses, pictures, cells, samples
        self._filled = np.zeros((shape.rows, shape.groups, 2), int)  # fed and scored tokens of each group
        cells = shape.cells or shape.pictures
        self._limits = np.array([shape.prompt, shape.groups, shape.responses, shape.pictures, cells, 1 << 30])

    def add(self, sample: Sample, *, share_rows: bool = True) -> Place | None:
        """Put a sample where it fits, its trees in groups of their own; None if this batch has no room left."""
        trees = [group if isinstance(group, Tree) else merge_branches(group) for group in sample.groups]
        refuse_what_never_fits(sample, trees, self.shape, groups=len(trees))
        need = self._need(sample, len(trees))
        for row in range(self.shape.rows):
            free = share_rows or self._used[row, -1] == 0
            if free and np.all(self._used[row] + need <= self._limits):
                first = int(self._used[row, 1])
                return self.put(sample, trees, row, range(first, first + len(trees)))
        return None

    def put(self, sample: Sample, trees: Sequence[Tree], row: int, groups: Sequence[int]) -> Place:
        """Put a sample into a row, each of its (merged) trees behind what one of the row's groups holds already.

        ValueError: it does not fit there.
        """
        used, need = self._used[row], self._need(sample, max(groups, default=-1) + 1)
        need[1] = max(need[1] - used[1], 0)
        if np.any(used + need > self._limits):
            raise ValueError(f"row {row} has no room for the sample")
        place = Place(row, min(groups, default=0), int(used[2]))
        self._write(sample, trees, row, groups)
        used += need
        return place

    @staticmethod
    def _need(sample: Sample, groups: int) -> np.ndarray:
        cells = sum(picture.cells for picture in sample.pictures)
        return np.array([len(sample.prompt), groups, sample.responses, len(sample.pictures), cells, 1])

    def _write(self, sample: Sample, trees: Sequence[Tree], row: int, groups: Sequence[int]) -> None:
        batch = self.batch
        start, _, response, picture, cell, count = (int(x) for x in self._used[row])
        end = start + len(sample.prompt)
        batch.prompt_tokens[row, start:end] = sample.prompt
        batch.prompt_segment[row, start:end] = count + 1
        for offset, item in enumerate(sample.pictures):
            batch.grid[row, picture + offset] = item.grid
            self._write_picture(row, cell, item)
            cell += item.cells
        for branches, tree, group in zip(sample.groups, trees, groups, strict=True):
            self._write_tree(row, group, response, end - 1, tree)
            roles = _roles(branches)
            batch.role[row, response : response + len(roles)] = roles
            response += len(roles)
        for index, tokens in sample.slot_names:
            batch.slot_name[row, start + index, : len(tokens)] = tokens

    def _write_picture(self, row: int, first: int, picture: Picture) -> None:
        """A canvas cell by cell; the first cell's noise bears the picture's identity, the others' derive from it."""
        batch = self.batch
        rows, columns = picture.grid
        at = (row, slice(first, first + rows * columns))
        batch.canvas[at], batch.mask[at] = cut(picture.canvas, picture.grid), cut(picture.mask, picture.grid)
        batch.confidence[at] = picture.confidence
        batch.noise_id[at] = (picture.noise_id + CELL_STRIDE * np.arange(rows * columns)) % (1 << 32)
        if picture.overview is not None:
            batch.canvas[row, first + rows * columns] = picture.overview

    def _write_tree(self, row: int, group: int, response: int, root: int, tree: Tree) -> None:
        batch, shape = self.batch, self.shape
        (held_fed, held_scored), added = self._filled[row, group], (len(tree.tokens), len(tree.targets))
        if held_fed + added[0] > shape.length or held_scored + added[1] > shape.targets:
            raise ValueError(f"group {group} of row {row} has no room for the tree")
        start = group * shape.length + int(held_fed)
        fed, first = slice(start, start + added[0]), shape.prompt + start
        batch.tokens[row, fed] = tree.tokens
        batch.parent[row, fed] = [root if parent < 0 else first + parent for parent in tree.parents]
        if tree.targets:
            token, parent, weight, branch = zip(*tree.targets)
            start = group * shape.targets + int(held_scored)
            at = slice(start, start + added[1])
            batch.target_token[row, at], batch.target_weight[row, at] = token, weight
            batch.target_parent[row, at] = [root if node < 0 else first + node for node in parent]
            batch.target_response[row, at] = response + np.array(branch)
            for place, weighed in enumerate(tree.choices, start):
                batch.choices[row, place, : len(weighed)] = weighed
        self._filled[row, group] += added


def split_prefix(sequences: Sequence[tuple[int, ...]], at_least: int) -> int:
    """Length of the longest common prefix that leaves every sequence a token of its own."""
    shortest = min(len(sequence) for sequence in sequences) - 1
    first = sequences[0]
    length = 0
    while length < shortest and all(sequence[length] == first[length] for sequence in sequences):
        length += 1
    if length < at_least:
        raise ValueError("the sequences do not share the prompt's pictures")
    return length
