"""The sampler against `score` in every family; seeds, neighbours, padding, ends, compilations, meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_folders import FAMILIES
from sampler_runs import GRIDS, TOKENS, pads, prompts, sample, scored, shape
from tiny import pack
from tiny_families import family_model

from csp_jax import sharding
from csp_jax.config import ParallelConfig
from csp_jax.data.batch import Batch, Sample
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.registry import leaf_sharding
from csp_jax.rollout import Samples, Sampling, make_sampler, sample_batch
from csp_jax.sharding import make_mesh, put_batch

pytestmark = pytest.mark.usefixtures("exact")

DRAWN = Sampling(TOKENS, temperature=0.8, top_k=40, top_p=0.95)
SEEDS = np.arange(12, dtype=np.uint32).reshape(4, 3) + 100
INTERN = {  # InternVL2's other language models
    "internvl2 llama": ["llm_config.model_type=llama", "llm_config.rope_scaling=null"],
    "internvl2 qwen2": ["llm_config.model_type=qwen2", "llm_config.rope_scaling=null"],
}


def in_a_batch(family: str, samples: list[Sample]) -> Batch:
    """Four rows, the last of them padding."""
    return pack(shape(family, 4), samples, share_rows=False)


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *INTERN])
def test_log_probs_are_those_of_score(name):
    """Drawn at a temperature and cut, yet the log-probabilities are the model's own; either side may be padded."""
    family = name.split()[0]
    model = family_model(family, *INTERN.get(name, []))
    asked = prompts(family, model.image_token, 1)
    said = sample(model, in_a_batch(family, asked), SEEDS, DRAWN)
    assert said.length.tolist() == [[TOKENS] * 3] * 3 + [[0] * 3]
    assert len({tuple(tokens) for row in said.tokens[:3] for tokens in row}) == 9
    found = Samples(
        *(getattr(said, field)[:3] for field in ("tokens", "log_probs", "drawn_log_probs", "length", "stopped"))
    )
    wanted = scored(model, family, asked, found)
    np.testing.assert_allclose(found.log_probs, wanted, atol=1e-4, rtol=0)
    assert wanted.std() > 0.3  # the model has opinions
    assert np.all(said.drawn_log_probs[:3] > said.log_probs[:3] - 1e-6)  # the likeliest tokens, sharpened
    for values in jax.tree.leaves(said):
        assert not values[3].any()  # padding

    other = sample(model, pads(in_a_batch(family, asked), left=True), SEEDS, DRAWN)
    np.testing.assert_array_equal(other.tokens, said.tokens)
    np.testing.assert_allclose(other.log_probs, said.log_probs, atol=1e-4, rtol=0)


# --- one family ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return family_model("llava")


@pytest.fixture(scope="module")
def asked(model: VisionLanguageModel) -> list[Sample]:
    return prompts("llava", model.image_token, 2)


@pytest.fixture(scope="module")
def said(model: VisionLanguageModel, asked: list[Sample]) -> Samples:
    with jax.default_matmul_precision("highest"):
        return sample(model, in_a_batch("llava", asked), SEEDS, DRAWN)


def test_a_sample_depends_on_its_prompt_and_seed_alone(model, asked, said):
    """In other rows, beside other prompts, in another order of seeds: the same tokens."""
    others = prompts("llava", model.image_token, 3)
    order = [2, 0, 1]
    moved = sample(
        model, in_a_batch("llava", [others[0], asked[2], asked[0], others[1]]), SEEDS[[3, 2, 0, 1]][:, order], DRAWN
    )
    for row, place in ((2, 1), (0, 2)):
        np.testing.assert_array_equal(moved.tokens[place], said.tokens[row][order])
        np.testing.assert_allclose(moved.log_probs[place], said.log_probs[row][order], atol=1e-5)
    again = sample(model, in_a_batch("llava", asked), SEEDS + 1, DRAWN)
    assert not np.any(np.all(again.tokens[:3] == said.tokens[:3], axis=-1)[:, 2])  # another seed, another sample
    np.testing.assert_array_equal(again.tokens[:3, :2], said.tokens[:3, 1:])  # the neighbour's seed, its sample


def test_many_samples_are_single_runs(model, asked, said):
    for number in range(3):
        one = sample(model, in_a_batch("llava", asked), SEEDS[:, number : number + 1], DRAWN)
        np.testing.assert_array_equal(one.tokens[:, 0], said.tokens[:, number])
        np.testing.assert_allclose(one.log_probs[:, 0], said.log_probs[:, number], atol=1e-5)


@pytest.mark.parametrize("kind", ["several", "at once", "never"])
def test_a_sample_ends_behind_a_stop_token(model, asked, said, kind):
    """The first of several that comes, kept as the last token; what would have followed is padding."""
    stop = {
        "several": (int(said.tokens[0, 0, 0]), int(said.tokens[1, 1, 2]), int(said.tokens[2, 2, TOKENS - 1])),
        "at once": tuple(range(model.config.text.vocab_size)),
        "never": (),
    }[kind]
    ended = sample(model, in_a_batch("llava", asked), SEEDS, Sampling(TOKENS, 0.8, 40, 0.95, stop))
    lengths = set()
    for row, number in np.ndindex(3, 3):
        tokens = said.tokens[row, number]
        ends = np.flatnonzero(np.isin(tokens, stop))
        length = int(ends[0]) + 1 if len(ends) else TOKENS
        lengths.add(length)
        assert ended.length[row, number] == length
        assert ended.stopped[row, number] == bool(len(ends))
        for found, wanted in ((ended.tokens, said.tokens), (ended.log_probs, said.log_probs)):
            np.testing.assert_allclose(found[row, number, :length], wanted[row, number, :length], atol=1e-5)
            assert not found[row, number, length:].any()
        np.testing.assert_array_equal(ended.weight[row, number], np.arange(TOKENS) < length)
    if kind == "several":
        assert {1, TOKENS} < lengths
    else:
        assert lengths == {1 if kind == "at once" else TOKENS}
    assert not ended.length[3].any()


def test_one_token_is_enough(model, asked, said):
    short = sample(model, in_a_batch("llava", asked), SEEDS, Sampling(1, 0.8, 40, 0.95))
    np.testing.assert_array_equal(short.tokens[..., 0], said.tokens[..., 0])


def test_greedy_samples_are_alike_whatever_their_seeds(model, asked):
    greedy = sample(model, in_a_batch("llava", asked), SEEDS, Sampling(TOKENS, temperature=0))
    assert np.all(greedy.tokens == greedy.tokens[:, :1])
    cold = sample(model, in_a_batch("llava", asked), SEEDS, Sampling(TOKENS, temperature=1e-4))
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    np.testing.assert_allclose(cold.log_probs, greedy.log_probs, atol=1e-5)


def test_batches_of_a_bucket_are_compiled_once(model):
    sampling = Sampling(TOKENS, temperature=0.9, stop=(5, 6))
    graphdef, state = nnx.split(model)
    before = sample_batch._cache_size()
    for seed in range(3):
        batch = in_a_batch("llava", prompts("llava", model.image_token, seed, GRIDS[: seed + 1]))
        make_sampler(graphdef, sampling)(jax.tree.map(lambda x: x * 1.01, state), batch, SEEDS + seed)
    assert sample_batch._cache_size() == before + 1


def test_nothing_is_fetched_while_it_runs(model, asked):
    graphdef, state = nnx.split(model)
    sampler = make_sampler(graphdef, DRAWN)
    batch, seeds = jax.tree.map(jnp.asarray, (in_a_batch("llava", asked), SEEDS))
    before = sampler(state, batch, seeds)  # compiled
    with jax.transfer_guard("disallow"):
        again = sampler(state, batch, seeds)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard does look
            sampler(state, batch, SEEDS)
    np.testing.assert_array_equal(again.tokens, before.tokens)


def test_half_precision(model, asked):
    """Its own tokens, scored in the same precision."""
    said = sample(model, in_a_batch("llava", asked), SEEDS, DRAWN, jnp.bfloat16)
    assert said.log_probs.dtype == np.float32
    found = jax.tree.map(lambda x: x[:3], said)
    half = scored(model, "llava", asked, found, jnp.bfloat16)
    full = scored(model, "llava", asked, found)
    assert np.abs(found.log_probs - half).max() < 0.1
    assert 1e-4 < np.abs(found.log_probs - full).max() < 0.3


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_mesh_changes_nothing(model, asked, said, monkeypatch):
    """Parameters split over fsdp and tensor, rows over data and fsdp."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    graphdef, state = nnx.split(model)
    place = leaf_sharding(mesh)
    split = jax.tree.map(
        lambda v: v.replace(jax.device_put(v.get_value(), place(v))),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    kernel = split["decoder"]["layers"]["attention"]["query"]["kernel"].get_value()
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    batch = in_a_batch("llava", asked)
    found = make_sampler(graphdef, DRAWN)(split, put_batch(batch, mesh, 0), put_batch(SEEDS, mesh, 0))
    np.testing.assert_array_equal(found.tokens, said.tokens)
    np.testing.assert_allclose(found.log_probs, said.log_probs, atol=1e-4)


def test_a_state_in_parts(model, asked, said):
    graphdef, first, second = nnx.split(model, lambda path, value: "decoder" in path, ...)
    found = make_sampler(graphdef, DRAWN)((first, second), in_a_batch("llava", asked), SEEDS)
    np.testing.assert_array_equal(found.tokens, said.tokens)


def test_rows_of_several_prompts_are_refused(model, asked):
    shared = pack(shape("llava", 1), asked[:2])
    with pytest.raises(ValueError, match="several prompts"):
        make_sampler(nnx.split(model)[0], DRAWN)(nnx.state(model), shared, SEEDS[:1])
