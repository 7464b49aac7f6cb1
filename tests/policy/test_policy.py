"""A GRPO update from end to end: what is sampled is what is scored, the reference is the base, the gradient is that of
plain full sequences, sampling again is bounded and counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from policy_ground import SAMPLES, TOKENS, chance, config, make_ground
from tiny import difference, pack

from csp_jax.data.batch import PLAIN, Batch, Branch, Sample, Shape
from csp_jax.losses.grpo import GrpoLoss, group_advantages
from csp_jax.losses.logprobs import score
from csp_jax.models.lora import LoraParam
from csp_jax.models.registry import load_model
from csp_jax.perturb import Schedule, to_canvas
from csp_jax.plan.program import step_program
from csp_jax.policy import Rollouts, batches_for, reference_log_probs, sample_seed
from csp_jax.rewards import REWARDS
from csp_jax.train.loop import Run, from_data, train
from csp_jax.train.state import split_model
from csp_jax.train.step import make_step

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def some_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "exact", chance)


def micro_batch(window: Batch, number: int) -> Batch:
    return jax.tree.map(lambda x: x[number], window)


def moved(run: Run) -> Run:
    """The run with an adapter that does something."""

    def fill(leaf: Any) -> Any:
        noise = np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32)
        return jax.device_put(leaf + 0.1 * noise, leaf.sharding)

    run.state = run.state.replace(trainable=jax.tree.map(fill, run.state.trainable))
    return run


@pytest.fixture(scope="module")
def run(ground: Path) -> Run:
    return moved(Run(config(ground, ground / "run")))


@pytest.fixture(scope="module")
def batch(run: Run) -> Batch:
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setitem(REWARDS, "exact", chance)
        return next(Rollouts(run)).batch


def scores(model: Any, batch: Batch) -> np.ndarray:
    graphdef, state = nnx.split(model)

    @jax.jit
    def of(state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return score(model, batch, model.pixels(batch, to_canvas(batch.canvas))).log_probs

    return np.asarray(of(state, batch))


def test_what_was_sampled_is_what_is_scored(run, batch):
    """The first ratio is 1: the sampler's log-probabilities are those that the update begins with."""
    assert batch.old_log_probs.shape == (2, 8, SAMPLES * TOKENS)
    for number in range(2):
        part = micro_batch(batch, number)
        there = part.target_weight > 0
        found = scores(run.model(), part)
        np.testing.assert_allclose(part.old_log_probs[there], found[there], atol=1e-4, rtol=0)
        assert not part.old_log_probs[~there].any()
        assert found[there].std() > 0.1
        assert np.all(part.role == PLAIN)


def test_the_first_update_clips_nothing(run, batch):
    loss = GrpoLoss()
    part = micro_batch(batch, 0)
    found, counts = loss.sums(jnp.asarray(scores(run.model(), part)), part), loss.counts(part)
    assert float(found["clipped_low"]) == float(found["clipped_high"]) == 0
    assert float(found["kl"] / counts["kl"]) > 1e-3  # the adapter does something
    assert 0 < float(counts["grpo"]) <= 8 * SAMPLES


def test_the_reference_is_the_base_bit_for_bit(ground, run, batch):
    """The run's model with its adapter off against the checkpoint's own, which has none."""
    base, plain = load_model(ground / "checkpoint"), dataclasses.replace
    for number in range(2):
        part = micro_batch(batch, number)
        there = part.target_weight > 0
        bare = plain(part, old_log_probs=None, reference_log_probs=None, advantage=None, response_weight=None)
        graphdef, trainable, frozen = split_model(base, ())
        placed = jax.tree.map(lambda x: jax.device_put(x, run.put(batch).canvas.sharding.mesh.devices.flat[0]), bare)
        wanted = np.asarray(reference_log_probs(graphdef, jnp.dtype("float32"), (trainable, frozen), placed))
        state = jax.device_get((run.state.trainable, run.state.frozen))
        found = np.asarray(reference_log_probs(run.graphdef, jnp.dtype("float32"), state, placed))
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_allclose(part.reference_log_probs[there], wanted[there], atol=1e-5)
        assert np.abs(scores(run.model(), part) - wanted)[there].max() > 1e-2


@pytest.mark.slow
def test_a_full_policy_is_compared_with_where_it_began(ground):
    """The copy stays what it was although the step gives its buffers up and the parameters move."""
    run = Run(config(ground, ground / "full", lora=False))
    rollouts = Rollouts(run)
    before = rollouts._with_reference(micro_batch(next(rollouts).batch, 0))
    step, window = run.step_function(), next(rollouts).batch
    old = jax.device_get(run.state.trainable)
    for _ in range(2):
        run.state, metrics = step(run.state, run.put(window))
    assert difference(jax.device_get(run.state.trainable), old) > 1e-3
    assert float(metrics["kl"]) > 0
    after = rollouts._with_reference(before)
    np.testing.assert_array_equal(after.reference_log_probs, before.reference_log_probs)


# --- the gradient ----------------------------------------------------------------------------------------------------


def keep_gradients() -> optax.GradientTransformation:
    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def sequences(batch: Batch) -> tuple[Batch, np.ndarray]:
    """Every response as a row of its own behind its own copy of prompt and picture, and where it came from."""
    rows, places = [], []
    size = batch.target_token.shape[1] // SAMPLES
    for row in range(len(batch.role)):
        length = int((batch.prompt_segment[row] > 0).sum())
        for number in range(SAMPLES):
            at = slice(number * size, (number + 1) * size)
            tokens = batch.target_token[row, at][batch.target_weight[row, at] > 0]
            rows.append((tuple(batch.prompt_tokens[row, :length].tolist()), tuple(tokens.tolist()), row))
            places.append((row, number))
    one = Shape(1, batch.prompt_tokens.shape[1], 1, size, size, 1, 1, batch.canvas.shape[2:4])
    whole = []
    for prompt, tokens, row in rows:
        alone = pack(one, [Sample(prompt, (), ((Branch(tokens, (1.0,) * len(tokens)),),))])
        alone.canvas[0], alone.grid[0] = batch.canvas[row], batch.grid[row]
        whole.append(alone)
    arrays = {name: np.concatenate([getattr(x, name) for x in whole]) for name in Batch.ARRAYS}
    return Batch(**arrays, groups=1), np.array(places)


def test_a_step_has_the_gradient_of_plain_sequences(run, batch):
    """[B] eq. 4 written out on sequences that share nothing; the policy has moved, so that some ratios are clipped."""
    generator = np.random.default_rng(1)
    noise = 0.2 * generator.standard_normal(batch.old_log_probs.shape).astype(np.float32)
    window = dataclasses.replace(batch, old_log_probs=batch.old_log_probs + noise)
    model = run.model()
    graphdef, trainable, frozen = split_model(model, ())
    trainable, frozen = jax.device_get((trainable, frozen))
    step = make_step(graphdef, GrpoLoss(), keep_gradients(), schedule=Schedule("none"), seed=0)
    start = type(run.state)(jnp.zeros((), jnp.int32), trainable, frozen, trainable, jnp.zeros((), jnp.int32))
    state, metrics = jax.jit(step)(start, window)
    assert float(metrics["clipped_low"]) > 0
    assert float(metrics["clipped_high"]) > 0

    def plain(trainable: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, trainable, frozen)
        total, count = jnp.zeros(()), 0.0
        for number in range(2):
            part = micro_batch(window, number)
            alone, places = sequences(part)
            log_probs = score(model, alone, model.pixels(alone, to_canvas(alone.canvas)), train=True).log_probs
            shape, at = (*part.role.shape, -1), (places[:, 0], places[:, 1])
            old, reference = (x.reshape(shape)[at] for x in (part.old_log_probs, part.reference_log_probs))
            mask, advantage = alone.target_weight, part.advantage[at][:, None]
            ratio = jnp.exp(log_probs - old)
            clipped = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
            kl = jnp.exp(reference - log_probs) - (reference - log_probs) - 1
            means = (jnp.where(mask > 0, clipped - 0.04 * kl, 0)).sum(1) / mask.sum(1)
            kept = part.response_weight[at]
            total, count = total - (means * kept).sum(), count + kept.sum()
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(plain))(trainable)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    assert difference(state.optimizer, gradient) < 1e-4
    assert all(np.any(x) for x in jax.tree.leaves(jax.device_get(nnx.filter_state(gradient, LoraParam))))


# --- sampling again --------------------------------------------------------------------------------------------------


class Rewards:
    """Rewards by round: how many of the first groups have spread; and how often it was asked."""

    def __init__(self, *spread: int):
        self.spread, self.calls = spread, 0

    def __call__(self, said: Any) -> list[float]:
        groups = len(said) // SAMPLES
        found = [
            float(number == 0 and group < self.spread[self.calls]) for group in range(groups) for number in range(4)
        ]
        self.calls += 1
        return found


def rolled(ground: Path, monkeypatch: pytest.MonkeyPatch, rewards: Rewards, rounds: int) -> Any:
    monkeypatch.setitem(REWARDS, "exact", rewards)
    return next(Rollouts(Run(config(ground, ground / "again", rollout={"rounds": rounds}))))


def test_groups_without_spread_are_sampled_again(ground, monkeypatch):
    """16 are wanted: 10 and 9 of 16 have spread; the third round is not needed."""
    rewards = Rewards(10, 9, 16)
    window = rolled(ground, monkeypatch, rewards, rounds=3)
    assert rewards.calls == 2
    assert np.all(window.batch.response_weight == 1)
    counts = {"questions": 32, "groups_alike": 13, "groups_alike_kept": 0, "groups_left_over": 3}
    assert window.counts == counts
    assert window.metrics["rounds"] == 2
    assert window.metrics["zero_spread"] == pytest.approx(13 / 32)
    assert window.metrics["reward"] == pytest.approx(19 / 128)
    assert window.metrics["reward_std"] == pytest.approx(np.std([1, 0, 0, 0], ddof=1) * 19 / 32)
    wanted, _ = group_advantages(np.array([[1.0, 0, 0, 0]] * 16))
    np.testing.assert_array_equal(window.batch.advantage.reshape(16, 4), wanted)


def test_sampling_again_is_bounded(ground, monkeypatch):
    """Five of 16 after two rounds: the rest is filled up, left out of the means and counted."""
    rewards = Rewards(2, 3, 16)
    window = rolled(ground, monkeypatch, rewards, rounds=2)
    assert rewards.calls == 2
    weight = window.batch.response_weight.reshape(16, SAMPLES)
    assert weight[:5].all()
    assert not weight[5:].any()
    assert window.counts["groups_alike"] == 27
    assert window.counts["groups_alike_kept"] == 11
    assert not window.batch.advantage.reshape(16, SAMPLES)[5:].any()


def test_all_alike_changes_nothing(ground, monkeypatch):
    still = {"learning_rate": 1e-2, "weight_decay": 0.0}
    run = Run(config(ground, ground / "nothing", loss={"name": "grpo", "kl_beta": 0.5}, optimizer=still))
    monkeypatch.setitem(REWARDS, "exact", Rewards(0, 0))
    window = next(Rollouts(run))
    before = jax.device_get(run.state.trainable)
    state, metrics = run.step_function()(run.state, run.put(window.batch))
    assert float(metrics["filtered"]) == 1
    assert float(metrics["loss"]) == 0
    after = jax.device_get(state.trainable)
    assert difference(after, before) == 0


def described(tree: Any) -> list[tuple[Any, ...]]:
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("rows", [0, 8])
def test_the_planned_sampler_is_the_one_that_runs(ground, monkeypatch, rows):
    run = Run(config(ground, ground / "planned", rollout={"rows": rows}))
    rollouts, given = Rollouts(run), []
    sampler = rollouts._sampler

    def watched(*arguments: Any) -> Any:
        given.append(arguments)
        return sampler(*arguments)

    monkeypatch.setattr(rollouts, "_sampler", watched)
    next(rollouts)
    planned = step_program(run.config, run.source_folder, run.mesh).sampler_arguments()
    assert len(given) == (1 if rows == 0 else 2)
    assert all(described(one) == described(planned) for one in given)


# --- the place in a run ----------------------------------------------------------------------------------------------


def test_seeds_differ_by_everything():
    base = (0, 1, 0, "q", 2)
    others = [(1, 1, 0, "q", 2), (0, 2, 0, "q", 2), (0, 1, 1, "q", 2), (0, 1, 0, "r", 2), (0, 1, 0, "q", 3)]
    assert len({sample_seed(*one) for one in (base, *others)}) == 6
    assert sample_seed(*base) == sample_seed(*base)


def test_a_rollout_serves_several_updates(ground):
    run = Run(config(ground, ground / "several", rollout={"updates": 2}))
    rollouts = Rollouts(run)
    first, again = next(rollouts), next(rollouts)
    assert first.batch is again.batch
    assert first.counts
    assert not again.counts
    assert not again.metrics
    following = next(rollouts)
    assert not np.array_equal(following.batch.prompt_tokens, first.batch.prompt_tokens)


@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_a_state_leads_on_to_the_same_windows(ground, used):
    """Also in the middle of a rollout: what was said is in the state."""
    run = Run(config(ground, ground / "state", rollout={"updates": 2}))
    wanted, other = Rollouts(run), Rollouts(run)
    for _ in range(used):
        next(wanted)
    other.set_state(wanted.get_state())
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(other).batch, next(wanted).batch)


def test_who_makes_the_batches(ground):
    assert batches_for(config(ground, ground / "x")) is Rollouts
    plain = config(ground, ground / "x", loss={"name": "sft"}, data={"recipe": {"name": "evidence"}})
    assert batches_for(plain) is from_data
    with pytest.raises(ValueError, match="sampled"):
        train(config(ground, ground / "forgotten"))
