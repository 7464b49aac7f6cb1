"""Which token is drawn: transformers' own warpers, frequencies against probabilities, seeds and numbers."""

from __future__ import annotations

import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from csp_jax.errors import UserError
from csp_jax.rollout import Sampling, draw, drawn_from

VOCABULARY = 50


def logits(seed: int, *shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def warped(values: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by the warpers of transformers, in the order of its `generate`."""
    scores = torch.tensor(values)
    ids = torch.zeros((len(values), 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    list(product((0.3, 1.0, 1.7), (0, 1, 7, 80), (1.0, 0.9, 0.3, 1e-4))),
)
def test_cuts_are_those_of_transformers(temperature, top_k, top_p):
    sampling = Sampling(1, temperature, top_k, top_p)
    values = logits(0, 40, VOCABULARY)
    found = np.asarray(jax.nn.softmax(drawn_from(jnp.asarray(values), sampling)))
    wanted = warped(values, sampling)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_equals_are_kept_together():
    """Where a cut would fall between equal logits none of them is preferred."""
    values = jnp.array([2.0, 1.0, 1.0, 1.0, 0.0])
    for sampling in (Sampling(1, top_k=2), Sampling(1, top_p=0.5)):
        assert np.isfinite(drawn_from(values, sampling)).tolist() == [True, True, True, True, False]


def bound(events: int, draws: int) -> float:
    """What no frequency of so many events exceeds its probability by, but once in a million (Hoeffding)."""
    return math.sqrt(math.log(2 * events * 1e6) / (2 * draws))


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.6), Sampling(1, 1.5, top_k=6, top_p=0.8)])
def test_frequencies_are_probabilities(sampling):
    """Over seeds, over the numbers of tokens, and jointly: token 4 says nothing about token 5."""
    words, draws = 12, 20_000
    values = logits(1, 1, words)
    wanted = warped(values, sampling)[0]
    seeds = jnp.arange(draws, dtype=jnp.uint32)[None]

    def tokens(seeds: jax.Array, number: int) -> np.ndarray:
        return np.asarray(draw(jnp.asarray(values)[:, None], seeds, jnp.asarray(number), sampling)[0])[0]

    first, second = tokens(seeds, 4), tokens(seeds, 5)
    for found in (first, second):
        assert np.abs(np.bincount(found, minlength=words) / draws - wanted).max() < bound(words, draws)
    joint = np.bincount(first * words + second, minlength=words**2) / draws
    assert np.abs(joint - np.outer(wanted, wanted).ravel()).max() < bound(words**2, draws)

    one_seed = jax.vmap(lambda number: draw(jnp.asarray(values)[:, None], seeds[:, :1], number, sampling)[0])
    along = np.asarray(one_seed(jnp.arange(draws))).ravel()
    assert np.abs(np.bincount(along, minlength=words) / draws - wanted).max() < bound(words, draws)


def test_log_probs_are_those_of_the_model_and_of_the_draw():
    values = logits(2, 3, 4, VOCABULARY)
    seeds = jnp.arange(12, dtype=jnp.uint32).reshape(3, 4)
    for sampling in (Sampling(1, 0.5, 9, 0.7), Sampling(1), Sampling(1, 0)):
        tokens, plain, drawn = (np.asarray(x) for x in draw(jnp.asarray(values), seeds, jnp.asarray(3), sampling))
        at = (*np.indices(tokens.shape), tokens)
        np.testing.assert_allclose(plain, torch.tensor(values).log_softmax(-1).numpy()[at], atol=1e-6)
        if sampling.temperature:
            chances = warped(values.reshape(12, -1), sampling).reshape(values.shape)
            np.testing.assert_allclose(drawn, np.log(chances[at]), atol=1e-5)
        else:
            np.testing.assert_array_equal(tokens, values.argmax(-1))
            np.testing.assert_array_equal(drawn, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)]
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError) as caught:
        Sampling(**{"max_tokens": 4, field: value})
    assert (caught.value.field, caught.value.value) == (f"sampling.{field}", value)
