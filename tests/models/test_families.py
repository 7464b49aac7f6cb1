"""Every family in the one batch: branches are the separate sequences, neighbours and buckets change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from flax import nnx
from golden_folders import FAMILIES
from tiny import difference, pack
from tiny_families import CELL, WORDS, family_model, family_picture

from csp_jax.data.batch import PLAIN, Batch, Branch, Sample, Shape
from csp_jax.losses.logprobs import score
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import to_canvas

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

GRIDS = ((2, 3), (1, 1), (3, 1))
Evaluate = Callable[[Batch], tuple[np.ndarray, nnx.State]]


def shape(family: str, rows: int, **sizes: int) -> Shape:
    wide = 620 if family == "qwen_vl" else 140
    values = {"prompt": wide, "groups": 2, "length": 10, "targets": 12, "responses": 8, "pictures": 4, "cells": 16}
    return Shape(rows=rows, canvas=(CELL[family], CELL[family]), **{**values, **sizes})


class Draw:
    def __init__(self, family: str, model: VisionLanguageModel, seed: int):
        self.family, self.model, self.generator = family, model, np.random.default_rng(seed)

    def words(self, low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in self.generator.integers(*WORDS, self.generator.integers(low, high + 1)))

    def sample(self, grids: Sequence[tuple[int, int]]) -> Sample:
        """Text, pictures and text, then two trees; the prompt may end right behind a picture."""
        prompt, pictures = self.words(1, 3), []
        for grid in grids:
            picture, slots = family_picture(self.family, self.generator, grid)
            pictures.append(picture)
            prompt += (self.model.image_token,) * slots + self.words(0, 2)
        return Sample(prompt, tuple(pictures), (self.tree(), self.tree()))

    def tree(self) -> tuple[Branch, ...]:
        stem = self.words(2, 4)
        return tuple(self.branch(stem[: 1 + number] + self.words(2, 3)) for number in range(2))

    def branch(self, tokens: tuple[int, ...]) -> Branch:
        return Branch(tokens, tuple(float(w) for w in self.generator.uniform(0.1, 1, len(tokens))), PLAIN)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> VisionLanguageModel:
    return family_model(family)


@pytest.fixture(scope="module")
def evaluate(model: VisionLanguageModel) -> Evaluate:
    """Log-probabilities, and the gradient of their weighted sum."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> tuple[jax.Array, nnx.State]:
        def weighted(state: nnx.State) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, state)
            log_probs = score(model, batch, model.pixels(batch, to_canvas(batch.canvas))).log_probs
            return (log_probs * batch.target_weight).sum(), log_probs

        (_, log_probs), gradient = jax.value_and_grad(weighted, has_aux=True)(state)
        return log_probs, gradient

    def call(batch: Batch) -> tuple[np.ndarray, nnx.State]:
        log_probs, gradient = run(state, batch)
        return np.asarray(log_probs), gradient

    return call


def alone(samples: Sequence[Sample]) -> list[Sample]:
    """Each branch as the whole of a sample of its own: all of it prompt but the last token, one target a token."""
    return [
        dataclasses.replace(sample, groups=((branch,),))
        for sample in samples
        for group in sample.groups
        for branch in group
    ]


def chain(batch: Batch, row: int, sample: Sample) -> None:
    """Move the one branch of a row into its prompt."""
    (branch,) = sample.groups[0]
    start, count = len(sample.prompt), len(branch.tokens)
    batch.prompt_tokens[row, start : start + count - 1] = branch.tokens[:-1]
    batch.prompt_segment[row, start : start + count - 1] = 1
    batch.tokens[row], batch.parent[row] = 0, 0
    batch.target_parent[row, :count] = start - 1 + np.arange(count)


def scored(batch: Batch, log_probs: np.ndarray) -> np.ndarray:
    return log_probs[batch.target_weight != 0]


def test_branches_are_the_separate_sequences(family, model, evaluate):
    """Two samples packed into one row, several pictures each, against every branch alone in a row without a tree."""
    draw = Draw(family, model, 1)
    grids = (GRIDS, GRIDS[2:]) if family != "qwen_vl" else (GRIDS[:1], GRIDS[1:2])
    samples = [draw.sample(some) for some in grids]
    batch = pack(shape(family, 1, groups=4, responses=16, cells=20), samples)
    assert batch.prompt_segment.max() == 2
    single = pack(shape(family, 8, groups=1), alone(samples), share_rows=False)
    for row, sample in enumerate(alone(samples)):
        chain(single, row, sample)
    log_probs, gradient = evaluate(batch)
    wanted, wanted_gradient = evaluate(single)
    np.testing.assert_allclose(scored(batch, log_probs), scored(single, wanted), atol=2e-5, rtol=0)
    assert difference(gradient, wanted_gradient) < 2e-5
    assert scored(batch, log_probs).std() > 0.3  # the model has opinions


def test_buckets_neighbours_and_sides_change_nothing(family, model, evaluate):
    """More room for text and cells, padding on the left, a neighbour in the row: the same log-probabilities."""
    draw = Draw(family, model, 2)
    sample, neighbour = draw.sample(GRIDS[:1]), draw.sample(GRIDS[1:2])
    room = shape(family, 1, groups=4, responses=16)
    plain = pack(room, [sample])
    wanted = scored(plain, evaluate(plain)[0])
    wider = dataclasses.replace(room, prompt=room.prompt + 24, cells=room.cells + 5, pictures=6)
    roomy = pack(wider, [sample])
    np.testing.assert_allclose(scored(roomy, evaluate(roomy)[0]), wanted, atol=1e-5)
    both = pack(room, [neighbour, sample])
    mine = both.target_response >= 4
    found = evaluate(both)[0][mine & (both.target_weight != 0)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    shift = room.prompt - len(sample.prompt)
    left = pack(room, [sample])
    for name in ("prompt_tokens", "prompt_segment"):
        setattr(left, name, np.roll(getattr(left, name), shift, axis=1))
    for name in ("parent", "target_parent"):
        values = getattr(left, name)
        setattr(left, name, np.where(values < room.prompt, np.minimum(values + shift, room.prompt - 1), values))
    np.testing.assert_allclose(scored(left, evaluate(left)[0]), wanted, atol=1e-5)


def test_pictures_matter_and_only_to_their_own_sample(family, model, evaluate):
    draw = Draw(family, model, 3)
    samples = [draw.sample(GRIDS[:1]), draw.sample(GRIDS[:1])]
    room = shape(family, 1, groups=4, responses=16)
    batch = pack(room, samples)
    log_probs = evaluate(batch)[0]
    changed = dataclasses.replace(batch, canvas=batch.canvas.copy())
    changed.canvas[0, 0] = 255 - changed.canvas[0, 0]
    found = evaluate(changed)[0]
    first = batch.target_response < 4
    used = batch.target_weight != 0
    assert np.all(found[first & used] != log_probs[first & used])
    np.testing.assert_array_equal(found[~first & used], log_probs[~first & used])
