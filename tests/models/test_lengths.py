"""Where rotary frequencies depend on a sequence's length: whose length counts, and where the regimes change."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import pack
from tiny_families import family_model

from csp_jax.data.batch import Branch, Sample, Shape
from csp_jax.models.attention import tree_layout
from csp_jax.models.interface import sequence_lengths
from csp_jax.models.internvl2 import InternVL2
from csp_jax.models.phi3_vision import Phi3Vision
from csp_jax.models.qwen_vl import QwenVL

POSITIONS = jnp.arange(40)[None]


def branch(count: int, weights: tuple[float, ...] | None = None) -> Branch:
    return Branch(tuple(range(5, 5 + count)), weights or (1.0,) * count)


def test_a_length_is_that_of_the_prompt_and_its_longest_branch():
    """The last token of an answer counts though it is never fed; what is not scored and other samples do not."""
    samples = [
        Sample((1,) * 7, (), ((branch(3), branch(5)), (branch(2),))),
        Sample((2,) * 4, (), ((Branch((9, 8, 7), (1.0, 0.0, 0.0)),),)),
        Sample((3,) * 6, (), ()),
    ]
    batch = pack(Shape(1, 24, 4, 8, 8, 4, 0, None), samples)
    layout = tree_layout(jnp.asarray(batch.prompt_segment), jnp.asarray(batch.parent), batch.groups)
    position = np.array([[*range(7), *range(4), *range(6), *range(7)]])
    following = jnp.asarray(position + 1)
    placed = jnp.take_along_axis(following, layout.root, axis=1) + layout.depth - 1
    prompt, fed = sequence_lengths(batch, layout, following, placed)
    assert prompt[0, :17].tolist() == [12] * 7 + [5] * 4 + [6] * 6
    used = [slice(0, 6), slice(8, 9), slice(16, 18)]  # tokens of the groups that were filled
    assert [set(fed[0, part].tolist()) for part in used] == [{12}, {12}, {5}]


@pytest.mark.parametrize("length", [480, 481])
def test_phi_changes_its_factors_beyond_the_trained_length(length):
    """As its configuration says, against the formula in PyTorch; the scale applies to both."""
    model = family_model("phi3_vision")
    assert isinstance(model, Phi3Vision)
    rope = model.config.rope
    cos, sin = model.rope(POSITIONS, jnp.full(POSITIONS.shape, length))
    factors = torch.tensor(rope.short if length <= 480 else rope.long)
    inverse = 1 / (factors * 10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    angle = torch.arange(40).float()[:, None] * inverse
    scale = math.sqrt(1 + math.log(4000 / 480) / math.log(480))
    np.testing.assert_allclose(cos[0], angle.cos() * scale, atol=1e-5)
    np.testing.assert_allclose(sin[0], angle.sin() * scale, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "alpha"), [(10, 1), (300, 1), (301, 3), (600, 3), (601, 7), (1200, 7), (1201, 15), (2401, 31)]
)
def test_qwen_stretches_its_base_in_evaluation_only(length, alpha):
    model = family_model("qwen_vl")
    assert isinstance(model, QwenVL)
    assert max(2 ** math.ceil(math.log2(length / 300) + 1) - 1, 1) == alpha
    lengths = jnp.full(POSITIONS.shape, length)
    base = 10000.0 * alpha ** (64 / 62)
    angle = np.arange(40)[:, None] * base ** -(np.arange(0, 64, 2) / 64)
    cos, sin, _ = model.rope(POSITIONS, lengths)
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-5)
    trained = model.rope(POSITIONS, lengths, train=True)
    assert len(trained) == 2
    np.testing.assert_allclose(
        trained[0][0], np.cos(np.arange(40)[:, None] * 1e4 ** -(np.arange(0, 64, 2) / 64)), atol=1e-5
    )


def test_qwen_scales_queries_beyond_the_trained_length():
    model = family_model("qwen_vl")
    positions = jnp.array([[0, 298, 299, 300, 5000]])
    _, _, scale = model.rope(positions, positions + 1)
    wanted = [1, 1, 1, math.log(301, 300), math.log(5001, 300)]
    np.testing.assert_allclose(scale[0, :, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("length", [100, 32768, 32769, 65536])
def test_internlm2_stretches_its_base_beyond_the_trained_length(length):
    model = family_model("internvl2")
    assert isinstance(model, InternVL2)
    cos, _ = model.rope(POSITIONS, jnp.full(POSITIONS.shape, length))
    stretch = 2.0 * length / 32768 - 1 if length > 32768 else 1.0
    base = 1e6 * stretch ** (16 / 14)
    np.testing.assert_allclose(cos[0], np.cos(np.arange(40)[:, None] * base ** -(np.arange(0, 16, 2) / 16)), atol=1e-5)
