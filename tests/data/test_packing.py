"""Rows that samples share: everything is there once, and nearly everything that is computed is real."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batch import SHAPE, quick, read_back, samples, wanted_targets

from csp_jax.data.batch import Batch, BatchOverflow, Branch, Sample, Shape
from csp_jax.data.packing import pack
from csp_jax.data.recipes.base import Drawn
from csp_jax.train.window import Collate, Window

MIX = json.loads((Path(__file__).parents[1] / "golden" / "mix.json").read_text())
ROW = Shape(2, 8 * MIX["prompt"], 4, 1600, 512, 256, 0, None)  # of eight pictures of the mix
ROOMY = dataclasses.replace(SHAPE, groups=3, length=24, targets=24)


@quick
@given(st.lists(samples(), max_size=9), st.integers(1, 2), st.booleans())
def test_packed_samples_can_be_read_back(many, count, whole):
    """Whatever found room is there once, token by token, below its own prompt; and nothing else is there."""
    batches, places = pack(many, ROOMY, count, whole=whole)
    assert len({batch.tokens.shape for batch in batches}) == 1
    shape = dataclasses.replace(
        ROOMY,
        prompt=batches[0].prompt_tokens.shape[1],
        length=batches[0].tokens.shape[1] // ROOMY.groups,
        targets=batches[0].target_token.shape[1] // ROOMY.groups,
    )
    assert not whole or shape == ROOMY
    prompts, weights = 0, 0.0
    for sample, place in zip(many, places, strict=True):
        if place is None:
            continue
        number, row = divmod(place.row, shape.rows)
        batch = batches[number]
        for offset, branch in enumerate(branch for group in sample.groups for branch in group):
            response = place.response + offset
            assert batch.role[row, response] == branch.role
            mine = (batch.target_response[row] == response) & (batch.target_weight[row] != 0)
            found = []
            for slot in np.flatnonzero(mine):
                tokens, root = read_back(batch, shape, row, int(slot), len(branch.tokens))
                segment = batch.prompt_segment[row] == batch.prompt_segment[row, root]
                assert root == np.flatnonzero(segment)[-1]
                np.testing.assert_array_equal(batch.prompt_tokens[row][segment], sample.prompt)
                found.append((tokens, float(batch.target_weight[row, slot])))
            assert found == wanted_targets(branch)
            weights += sum(branch.weights)
        prompts += len(sample.prompt)
    assert sum(batch.target_weight.sum() for batch in batches) == pytest.approx(weights)
    assert sum(int((batch.prompt_segment > 0).sum()) for batch in batches) == prompts


@quick
@given(st.lists(samples(), min_size=1, max_size=9))
def test_one_sample_a_row_always_finds_room(many):
    """Where each could have a row to itself, none is left over."""
    roomy = dataclasses.replace(ROOMY, rows=len(many), groups=12)
    assert None not in pack(many, roomy, 1)[1]


def test_what_never_fits_is_refused():
    with pytest.raises(BatchOverflow, match="a sample needs 100") as caught:
        pack([Sample((1,) * 100, (), ())], ROOMY, 1)
    assert caught.value.field == "shape.prompt"


def picture_of(fed: list[int], scored: int) -> Sample:
    """A sample as long as one of the mix: a prompt, and queries with a label each."""
    words = (tuple(range(1, count + 2)) for count in fed)
    groups = tuple((Branch(tokens, (0.0,) * (len(tokens) - scored) + (1.0,) * scored),) for tokens in words)
    return Sample((1,) * MIX["prompt"], (), groups)


def mix(generator: np.random.Generator, count: int) -> list[Drawn]:
    """Pictures by chance: a third with the six questions of a POPE file, a third with all of AMBER's queries about it
    (7 to 25), a third with one long answer.
    """
    drawn = []
    for kind in generator.choice(["pope", "amber", "long"], count):
        chosen = MIX[kind][int(generator.integers(len(MIX[kind])))]
        fed = [chosen] if kind == "long" else chosen[:6] if kind == "pope" else chosen
        drawn.append(Drawn(picture_of(fed, MIX["scored"]), Counter()))
    return drawn


def windows(collate: Collate, number: int = 12) -> list[Window]:
    generator = np.random.default_rng(0)
    return [collate(mix(generator, collate.shape.rows * collate.accumulation * collate.samples)) for _ in range(number)]


def real_share(batch: Batch) -> float:
    """Of what the decoder computes, the prompt and fed tokens that are not padding: 1 - `padding` of the metrics."""
    real = (batch.prompt_segment > 0).sum() + (batch.tokens > 0).sum()
    return float(real / (batch.prompt_segment.size + batch.tokens.size))


def test_nine_of_ten_computed_tokens_are_real():
    """On POPE's and AMBER's queries and long answers about pictures of 576 slots, 64 pictures an update."""
    alone = Shape(16, MIX["prompt"], 25, max(MIX["long"]), 16, 25, 0, None)
    before, after = windows(Collate(alone, 4)), windows(Collate(ROW, 4, 8))
    shares = [real_share(window.batch) for window in after]
    assert not any(window.counts for window in after)  # nothing is left over
    assert np.mean([real_share(window.batch) for window in before]) < 0.3
    real = [[(window.batch.tokens > 0).sum() for window in part] for part in (before, after)]
    assert real[0] == real[1]
    assert min(shares) > 0.9
    shapes = {(window.batch.tokens.shape, window.batch.target_token.shape) for window in after}
    assert len(shapes) <= 6  # compilations


def test_a_window_depends_on_what_is_drawn_alone():
    """So a run that goes on packs as one that was never stopped."""
    collate, again = Collate(ROW, 2, 8), Collate(ROW, 2, 8)
    drawn = [mix(np.random.default_rng(seed), 32) for seed in range(3)]
    first = [collate(part) for part in drawn]
    alone = again(drawn[2])
    for name in alone.batch.ARRAYS:
        if getattr(alone.batch, name) is not None:
            np.testing.assert_array_equal(getattr(alone.batch, name), getattr(first[2].batch, name))
