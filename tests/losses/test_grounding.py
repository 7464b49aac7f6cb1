"""Naming picture slots, against torch; and only slots that have a name count."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from tiny import SIDE, pack

from csp_jax.data.batch import Batch, Sample, Shape
from csp_jax.losses.grounding import grounding_counts, grounding_sums

WIDTH, WORDS = 16, 20

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture
def batch() -> Batch:
    """Two samples in a row and one in the next; some of their slots are named."""
    shape = Shape(2, 12, 1, 1, 1, 2, 0, (SIDE, SIDE))
    samples = [
        Sample((1, 3, 3, 3), (), (), ((1, (5,)), (3, (0, 7, 11)))),
        Sample((1, 3, 3, 4, 5, 6, 7), (), (), ((2, (19, 5)),)),
        Sample((1, 3, 3, 3), (), (), ()),
    ]
    return pack(shape, samples)


def test_grounding_is_torch_cross_entropy_of_cosines(batch):
    generator = np.random.default_rng(0)
    prompt = generator.standard_normal((2, 12, WIDTH)).astype(np.float32)
    words = generator.standard_normal((WORDS, WIDTH)).astype(np.float32)

    def loss(prompt: jax.Array, words: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = grounding_sums(prompt, words, batch)
        return sums["grounding"], sums

    (value, sums), slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(prompt, words)
    theirs, their_words = torch.from_numpy(prompt).requires_grad_(), torch.from_numpy(words).requires_grad_()
    rows, places, names = [0, 0, 0], [1, 3, 4 + 2], [[5], [0, 7, 11], [19, 5]]
    slots = theirs[rows, places]
    cosine = torch.nn.functional.cosine_similarity(slots[:, None], their_words[None], dim=-1)
    shares = torch.stack([torch.eye(WORDS)[chosen].mean(0) for chosen in names])
    wanted = torch.nn.functional.cross_entropy(cosine * WIDTH**0.5, shares, reduction="sum")
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-5)
    assert float(sums["slot_accuracy"]) == sum(int(best) in chosen for best, chosen in zip(cosine.argmax(-1), names))
    np.testing.assert_allclose(slopes[0], theirs.grad, atol=1e-5)
    np.testing.assert_allclose(slopes[1], their_words.grad, atol=1e-5)
    assert {name: float(count) for name, count in grounding_counts(batch).items()} == {
        "grounding": 3,
        "slot_accuracy": 3,
    }
