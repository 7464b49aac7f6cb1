"""Texts that continue places in trees, against the sampler on every path as a prompt of its own."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from golden_folders import FAMILIES
from sampler_runs import PROMPT, prompts, sample
from tiny import pack
from tiny_families import CELL, WORDS, family_model

from csp_jax.data.batch import Batch, Sample, Shape, Tree
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import to_canvas
from csp_jax.rollout import Samples, Sampling, continue_targets

pytestmark = pytest.mark.usefixtures("exact")

TOKENS, GROUPS, TEXTS, LENGTH = 5, 2, 3, 12
DRAWN = Sampling(TOKENS)


def tree(generator: np.random.Generator, ends: int) -> tuple[Tree, list[tuple[int, ...]]]:
    """Paths that begin alike and end at unlike depths, one of them within another; the first text of the last tree
    continues the prompt itself."""
    common, own = (tuple(int(t) for t in generator.integers(*WORDS, count)) for count in (3, 4))
    tokens = [*common, *own, int(generator.integers(*WORDS))]
    parents = [-1, 0, 1, 2, 3, 4, 5, 1]
    places = [4, 6, 7] if ends == TEXTS else [-1, 7]
    paths = {4: (*common, *own[:2]), 6: (*common, *own), 7: (*common[:2], tokens[7]), -1: ()}
    return Tree(tokens, parents, [(0, place, 1.0, 0) for place in places]), [paths[place] for place in places]


def asked(family: str, model: VisionLanguageModel) -> tuple[list[Sample], list[Sample]]:
    """Rows of two trees, and every path of every tree as a prompt."""
    generator = np.random.default_rng(7)
    rows, alone = [], []
    for prompt in prompts(family, model.image_token, 5, ((1, 2), (1, 1))):
        trees, paths = zip(*(tree(generator, ends) for ends in (TEXTS, TEXTS - 1)))
        rows.append(Sample(prompt.prompt, prompt.pictures, trees))
        alone += [Sample(prompt.prompt + path, prompt.pictures, ()) for one in paths for path in one]
    return rows, alone


def size(family: str, rows: int, groups: int) -> Shape:
    side = CELL[family]
    room = (LENGTH, TEXTS) if groups else (0, 0)
    return Shape(rows, PROMPT.get(family, 60) + 12, groups, *room, groups, 2, (side, side), 8)


@functools.partial(jax.jit, static_argnums=0)
def texts(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, seeds: np.ndarray) -> Samples:
    model = nnx.merge(graphdef, state)
    prompt = model.embed_prompt(batch, model.pixels(batch, to_canvas(batch.canvas)))
    return continue_targets(model, batch, prompt, seeds, DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_prompts_of_their_own(family: str):
    model = family_model(family)
    rows, alone = asked(family, model)
    graphdef, state = nnx.split(model)
    batch = pack(size(family, 3, GROUPS), rows, share_rows=False)  # the last row is padding
    seeds = np.zeros(batch.target_parent.shape, np.uint32)
    seeds[batch.target_weight != 0] = np.arange(len(alone))
    said: Samples = jax.tree.map(np.asarray, texts(graphdef, state, batch, seeds))
    whole = pack(size(family, len(alone), 0), alone, share_rows=False)
    wanted = sample(model, whole, np.arange(len(alone))[:, None], DRAWN)

    there = batch.target_weight != 0
    assert there.sum() == len(alone)
    assert not said.tokens[~there].any()
    np.testing.assert_array_equal(said.tokens[there], wanted.tokens[:, 0])
    np.testing.assert_allclose(said.log_probs[there], wanted.log_probs[:, 0], atol=1e-4, rtol=0)
    assert len({tuple(text) for text in said.tokens[there]}) > len(alone) // 2  # they say different things
