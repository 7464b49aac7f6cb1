"""Samples that grow into another rotary regime: as they are generated, and as whole sequences are scored."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampler_runs import answered, sample
from tiny import jitted_score, pack
from tiny_families import WORDS, family_model

from csp_jax.data.batch import Batch, Shape
from csp_jax.data.batch import Sample as Prompt
from csp_jax.losses.logprobs import head_log_probs
from csp_jax.models.attention import tree_layout
from csp_jax.models.interface import Places, VisionLanguageModel
from csp_jax.models.internvl2 import InternVL2
from csp_jax.rollout import Samples, Sampling

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

BOUNDARY, TOKENS, SAMPLES = 24, 8, 2
FAMILIES = {
    "phi3_vision": "original_max_position_embeddings",
    "qwen_vl": "seq_length",
    "internvl2": "llm_config.max_position_embeddings",
}
LENGTHS = (BOUNDARY - 3, BOUNDARY - TOKENS - 1, BOUNDARY + 2)  # crosses, stays below, is beyond from the start
SEEDS = np.arange(3 * SAMPLES).reshape(3, SAMPLES)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return family_model(request.param, f"{FAMILIES[request.param]}={BOUNDARY}")


def prompts() -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [Prompt(tuple(int(t) for t in generator.integers(*WORDS, length)), (), ()) for length in LENGTHS]


def flat(asked: Sequence[Prompt], said: Samples | None = None) -> Batch:
    if said is None:
        return pack(Shape(3, 30, 0, 0, 0, 0, 0, None), asked, share_rows=False)
    shape = Shape(3, 30, SAMPLES, TOKENS - 1, TOKENS, SAMPLES, 0, None)
    return pack(shape, answered(asked, said), share_rows=False)


@functools.partial(jax.jit, static_argnums=0)
def run_whole(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, lengths: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    layout = tree_layout(batch.prompt_segment, batch.parent, batch.groups)
    positions, following = model.positions(batch)
    branch = jnp.take_along_axis(following, layout.root, axis=1) + layout.depth - 1
    of_prompt = jnp.broadcast_to(lengths[:, :1], positions.shape)
    places = Places(positions, branch, of_prompt, jnp.take_along_axis(lengths, layout.depth, axis=1))
    hidden = model.hidden_states(batch, model.embed_prompt(batch, None), places=places)
    return head_log_probs(hidden, model.decoder.head_kernel(), batch.target_token).log_probs


def whole(model: VisionLanguageModel, batch: Batch, lengths: np.ndarray) -> np.ndarray:
    """Log-probabilities [rows, samples, tokens] of whole sequences, without any memory: `lengths` [rows, 1 + TOKENS]
    are those that count for a row's prompt and for each of its samples' tokens."""
    return np.asarray(run_whole(*nnx.split(model), batch, lengths)).reshape(3, SAMPLES, TOKENS)


def scored(model: VisionLanguageModel, batch: Batch) -> np.ndarray:
    return np.asarray(jitted_score(model, batch, None).log_probs).reshape(3, SAMPLES, TOKENS)


def test_generation_keeps_what_was_read(model):
    """Each token as of the length when it was fed, or (Qwen-VL) all as of the prompt's."""
    asked = prompts()
    said = sample(model, flat(asked), SEEDS, Sampling(TOKENS))
    lengths = np.array(LENGTHS)[:, None] + np.arange(TOKENS + 1) * (not model.length_of_prompt)
    batch = flat(asked, said)
    np.testing.assert_allclose(said.log_probs, whole(model, batch, lengths), atol=1e-4, rtol=0)

    alone = scored(model, batch)  # every token as of the whole sequence's length
    np.testing.assert_allclose(said.log_probs[1], alone[1], atol=1e-4, rtol=0)
    assert np.abs(said.log_probs[0] - alone[0]).max() > 1e-3


def test_reading_again_is_what_score_says(model):
    """Each token as of the regime of the sequence up to it; behind the crossing as `score` has it to the end."""
    asked = prompts()
    said = sample(model, flat(asked), SEEDS, Sampling(TOKENS, prefill_again=True))
    kept = sample(model, flat(asked), SEEDS, Sampling(TOKENS))
    np.testing.assert_array_equal(said.tokens[1], kept.tokens[1])  # a neighbour that crosses is none of its business
    np.testing.assert_allclose(said.log_probs[1], kept.log_probs[1], atol=1e-5)
    assert np.abs(said.log_probs[0] - kept.log_probs[0]).max() > 1e-3
    if isinstance(model, InternVL2):
        return  # beyond its boundary every length has frequencies of its own; there is no regime to be in
    batch = flat(asked, said)
    for number in range(TOKENS):
        lengths = np.broadcast_to(np.array(LENGTHS)[:, None] + number, (3, TOKENS + 1))
        now = whole(model, batch, lengths)[:, :, number]
        np.testing.assert_allclose(said.log_probs[:, :, number], now, atol=1e-4, rtol=0)
    crossed = BOUNDARY + 1 - LENGTHS[0]  # the first token that is said in a sequence beyond the boundary
    to_the_end = scored(model, batch)
    np.testing.assert_allclose(said.log_probs[0, :, crossed:], to_the_end[0, :, crossed:], atol=1e-4, rtol=0)
    np.testing.assert_allclose(said.log_probs[1:], to_the_end[1:], atol=1e-4, rtol=0)
