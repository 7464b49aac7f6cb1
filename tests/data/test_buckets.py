"""Buckets: whatever fits, few of them, and the same answers in each."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny import pack
from tiny_families import WORDS, family_model, family_picture

from csp_jax.data.batch import Batch, Branch, Sample, Shape, Tree
from csp_jax.data.buckets import STEPS, Buckets, alike, bucket
from csp_jax.evaluate import PATIENCE
from csp_jax.losses.logprobs import score
from csp_jax.perturb import to_canvas

MIX = json.loads((Path(__file__).parents[1] / "golden" / "mix.json").read_text())


@given(st.integers(0, 10**6))
def test_a_bucket_holds_its_size_with_little_to_spare(size):
    found = bucket(size)
    assert found >= size
    assert bucket(found) == found
    assert found <= 16 or found - size < found / (STEPS + 1) + 1


def test_buckets_are_few():
    found = {bucket(size) for size in range(17, 16385)}
    assert len(found) == STEPS * math.log2(16384 / 16)
    assert sorted({bucket(size) for size in range(70)}) == [0, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80]


def test_an_evaluation_computes_little_padding():
    """POPE's 18 questions a picture, AMBER's 7 to 25, and long answers, 1664 pictures in one sweep of eight rows: nine
    of ten tokens are real, in few programs; parts as they come compute two times as much.
    """
    pictures = []
    for kind in ("pope", "amber", "long"):
        for sizes in MIX[kind]:
            trees = [query(size) for size in ([sizes] if kind == "long" else sizes) for _ in ("yes", "no")]
            pictures.append(Sample((1,) * MIX["prompt"], (), tuple(trees)))
    samples = [pictures[number] for number in np.random.default_rng(0).permutation(4 * len(pictures)) % len(pictures)]
    real = sum(len(sample.prompt) + sum(len(tree.tokens) for tree in sample.groups) for sample in samples)
    whole = Shape(8, MIX["prompt"], 50, max(MIX["long"]), 16, 50, 0, None)
    parts, buckets = alike(samples, 8), Buckets(whole, PATIENCE)
    assert sorted(number for part in parts for number in part) == list(range(len(samples)))

    def computed(buckets: Buckets, parts: list[list[int]]) -> int:
        shapes = [buckets([samples[number] for number in part]) for part in parts]
        return sum(shape.rows * (shape.prompt + shape.groups * shape.length) for shape in shapes)

    assert real / computed(buckets, parts) > 0.9
    assert len(buckets.used) < 16
    in_turn = [list(range(start, min(start + 8, len(samples)))) for start in range(0, len(samples), 8)]
    assert real / computed(Buckets(whole), in_turn) < 0.45


def query(tokens: int) -> Tree:
    """A confidence query about one of two answers."""
    return Tree([1] * tokens, list(range(-1, tokens - 1)), [(1, tokens - 1, 1.0, 0)])


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_pictures_of_many_sizes_are_scored_alike_in_few_programs(caplog):
    """Twenty pictures of twenty shapes: a handful of compilations, and the log-probabilities of the largest shape."""
    model, generator = family_model("qwen2_vl"), np.random.default_rng(0)
    samples = []
    for _ in range(20):
        grid = tuple(int(side) for side in generator.integers(1, 9, 2))
        picture, slots = family_picture("qwen2_vl", generator, (grid[0], grid[1]))
        words = tuple(int(token) for token in generator.integers(*WORDS, 6))
        prompt = (*words[:2], *(model.image_token,) * slots)
        samples.append(Sample(prompt, (picture,), ((Branch(words[2:], (1.0,) * 4),),)))
    assert len({sample.pictures[0].grid for sample in samples}) > 15
    whole = Shape(1, 70, 1, 4, 4, 1, 1, samples[0].pictures[0].cell, 64)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return score(model, batch, model.pixels(batch, to_canvas(batch.canvas))).log_probs

    buckets = Buckets(whole)
    with caplog.at_level(logging.INFO):
        found = [np.asarray(run(state, pack(buckets([sample]), [sample]))) for sample in samples]
    compiled = run._cache_size()
    assert compiled == len(buckets.used) == len(caplog.records) < 12
    assert sum(buckets.used.values()) == len(samples)
    assert len({shape.prompt for shape in buckets.used}) > 2
    wanted = [np.asarray(run(state, pack(whole, [sample]))) for sample in samples]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
