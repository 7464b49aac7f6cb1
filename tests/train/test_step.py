"""The training step: accumulated is full batch, eight devices are one, what is frozen stays, one compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import IMAGE_TOKEN, SIDE, SLOTS, difference, pack, random_picture, stack, tiny_model

from csp_jax.config import OptimizerConfig, ParallelConfig
from csp_jax.data.batch import CHOSEN, PLAIN, REJECTED, Batch, Branch, Sample, Shape
from csp_jax.errors import UserError
from csp_jax.losses.interface import Loss
from csp_jax.losses.sft import SftLoss
from csp_jax.losses.simpo import SimpoLoss
from csp_jax.models.hub import flat_paths
from csp_jax.models.llava import Llava
from csp_jax.perturb import Schedule
from csp_jax.sharding import (
    PMAP_AXIS,
    compile_parts,
    compile_step,
    layer_wrapper,
    make_mesh,
    put_batch,
    put_parts,
)
from csp_jax.train.configured import REMAT, make_optimizer
from csp_jax.train.loop import place_state
from csp_jax.train.state import TrainState, new_state, split_model
from csp_jax.train.step import make_step

pytestmark = pytest.mark.usefixtures("exact")

ROWS = 8


@pytest.fixture(scope="module")
def model() -> Llava:
    return tiny_model(seed=2)


def shape(rows: int) -> Shape:
    return Shape(rows, 12, 2, 16, 14, 5, 1, (SIDE, SIDE))


class Samples:
    """Rows that differ in tokens, in noise and in what they hold: half have a pair, some have plain answers."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def words(self, low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in self.generator.integers(4, 96, self.generator.integers(low, high + 1)))

    def branch(self, role: int, longest: int = 5) -> Branch:
        query, answer = self.words(1, 2), self.words(max(1, longest - 2), longest)
        return Branch(query + answer, (0.0,) * len(query) + (1.0,) * len(answer), role)

    def sample(self, number: int) -> Sample:
        number %= ROWS
        prompt = (1, *(IMAGE_TOKEN,) * SLOTS, *self.words(1, 5))
        groups = []
        if number % 2 == 0:
            groups.append((self.branch(CHOSEN), self.branch(REJECTED)))
        if number % 4 != 2:
            groups.append((self.branch(PLAIN, 1 + number),))  # the later, the longer
        picture = random_picture(self.generator, float(self.generator.integers(0, 101)))
        return Sample(prompt, (picture,), tuple(groups))


def windows(seed: int, rows: int, count: int = ROWS) -> Batch:
    """The same samples for any number of rows a micro-batch."""
    samples = [Samples(seed * 100 + number).sample(number) for number in range(count)]
    parts = [samples[start : start + rows] for start in range(0, count, rows)]
    return stack([pack(shape(rows), part, share_rows=False) for part in parts])


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing and holds the last gradients as its state."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def stepper(
    model: Llava, loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[Batch], tuple[TrainState, dict[str, float]]]:
    """A first step from the model, compiled once a shape."""
    graphdef, _, _ = split_model(model, ())
    step = jax.jit(make_step(graphdef, loss, optimizer, schedule=Schedule(), seed=3))
    start = new_state(model, optimizer, ())

    def run(window: Batch) -> tuple[TrainState, dict[str, float]]:
        state, metrics = step(start, window)
        return state, {name: float(value) for name, value in metrics.items()}

    return run


# A large epsilon: some gradients (of the tower's key biases) are zero but for rounding, and Adam would blow that up.
ADAM = OptimizerConfig(learning_rate=1e-2, schedule="constant", epsilon=1e-3, weight_decay=0.1, clip=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [SftLoss(), SimpoLoss(retention=0.7, nll_weight=0.2)], ids=["sft", "simpo"])
def test_accumulated_is_full_batch(model, loss):
    """Micro-batches of unlike token counts; the mean of micro-batch means would be elsewhere."""
    parts, whole = windows(0, rows=2), windows(0, rows=ROWS)
    counts = np.asarray(parts.target_weight).sum(axis=(1, 2))
    assert counts.max() > 1.5 * counts.min()
    run = stepper(model, loss, keep_gradients())
    split, split_metrics = run(parts)
    full, full_metrics = run(whole)
    assert difference(split.optimizer, full.optimizer) < 3e-6
    assert split_metrics == pytest.approx(full_metrics, rel=1e-5)
    micro = [run(stack_of(parts, number))[1]["loss"] for number in range(len(counts))]
    assert abs(np.mean(micro) - full_metrics["loss"]) > 1e-3 * full_metrics["loss"]

    optimizer = make_optimizer(ADAM, 10)
    _, params, _ = split_model(model, ())
    after = []
    for state in (split, full):
        updates, _ = optimizer.update(state.optimizer, optimizer.init(params), params)
        after.append(optax.apply_updates(params, updates))
    assert difference(*after) < 1e-6
    assert difference(after[0], params) > 1e-3


def stack_of(window: Batch, number: int) -> Batch:
    arrays = {name: getattr(window, name)[number : number + 1] for name in Batch.ARRAYS}
    return Batch(**arrays, groups=window.groups)


UPDATES = 5


def run_on(config: ParallelConfig, devices: list[jax.Device], model: Llava) -> tuple[TrainState, list[dict], Any]:
    """Five steps over five windows, compiled for a mesh, or mapped over the devices."""
    mesh, mapped = make_mesh(config, devices), config.strategy == "pmap"
    optimizer = make_optimizer(ADAM, UPDATES)
    graphdef, _, _ = split_model(model, ())
    shardings, state = place_state(jax.tree.map(jnp.copy, model), optimizer, (), mesh)
    options = {"axis": PMAP_AXIS} if mapped else {"remat": layer_wrapper(mesh, None)}
    step = make_step(graphdef, SimpoLoss(), optimizer, schedule=Schedule(), seed=3, **options)
    compiled = compile_parts(step, mesh) if mapped else compile_step(step, mesh, shardings)
    put = put_parts if mapped else put_batch
    history = []
    for number in range(UPDATES):
        state, metrics = compiled(state, put(windows(number, rows=ROWS, count=2 * ROWS), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history, compiled


@pytest.fixture(scope="module")
def on_one_device(model: Llava) -> tuple[TrainState, list[dict], Any]:
    with jax.default_matmul_precision("highest"):
        return run_on(ParallelConfig(data=1), jax.devices()[:1], model)


def assert_same(found: tuple[TrainState, list[dict], Any], wanted: tuple[TrainState, list[dict], Any]) -> None:
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=3e-4)
    assert difference(found[0].trainable, wanted[0].trainable) < 1e-5
    assert int(found[0].step) == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(data=2, fsdp=4), ParallelConfig(tensor=2), ParallelConfig(fsdp=2, tensor=2)],
    ids=["data", "fsdp", "tensor", "all"],
)
def test_eight_devices_are_one(model, on_one_device, parallel, monkeypatch):
    monkeypatch.setattr("csp_jax.sharding.SMALLEST_SHARDED", 1)  # tiny tensors too
    assert len(jax.devices()) == 8
    state, history, compiled = run_on(parallel, jax.devices(), model)
    assert_same((state, history, compiled), on_one_device)
    assert compiled._cache_size() == 1
    kernel = flat_paths(state.trainable)["decoder.layers.mlp.up.kernel"].get_value()
    axes = {axis for axis in kernel.sharding.spec if axis is not None}
    assert axes == {name for name in ("fsdp", "tensor") if getattr(parallel, name) > 1}
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == kernel.shape]
    assert len(moments) == 4  # two of this kernel, two of the gate's
    assert all(leaf.sharding == kernel.sharding for leaf in moments)


@pytest.mark.slow
def test_pmap_over_eight_devices_is_one(model, on_one_device):
    found = run_on(ParallelConfig(strategy="pmap"), jax.devices(), model)
    assert_same(found, on_one_device)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found[0].trainable))


def test_an_update_that_is_not_finite_is_left_out(model):
    """Only the step number and the count change; the next good update is what it would have been."""
    optimizer = make_optimizer(ADAM, 3)
    graphdef, _, _ = split_model(model, ())
    step = jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=0))
    first, _ = step(new_state(model, optimizer, ()), windows(0, rows=4))
    broken = windows(1, rows=4)
    broken.target_weight[0, 0, :2] = np.inf
    after, metrics = step(first, broken)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    for old, new in zip(
        jax.tree.leaves((first.trainable, first.optimizer)),
        jax.tree.leaves((after.trainable, after.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    good, metrics = step(after, windows(2, rows=4))
    skipping, _ = step(dataclasses.replace(first, step=jnp.int32(2)), windows(2, rows=4))
    assert int(good.skipped) == 1
    assert np.isfinite(metrics["loss"])
    for old, new in zip(jax.tree.leaves(skipping.trainable), jax.tree.leaves(good.trainable), strict=True):
        np.testing.assert_array_equal(old, new)


def test_one_compilation_for_batches_of_one_shape(on_one_device):
    assert on_one_device[2]._cache_size() == 1


def test_frozen_and_unused_leaves_stay_bit_for_bit(model):
    """Under weight decay; and everything else moves."""
    optimizer = make_optimizer(ADAM, 3)
    freeze = ("vision", r"decoder\.embed")
    graphdef, _, _ = split_model(model, freeze)
    before = new_state(model, optimizer, freeze)
    step = jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=0))
    state = before
    for number in range(2):
        state, _ = step(state, windows(number, rows=4))
    names = set(flat_paths(state.frozen))
    assert {name for name in flat_paths(nnx.state(model)) if name.startswith(("vision", "decoder.embed"))} == names
    for old, new in zip(jax.tree.leaves(before.frozen), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    old_leaves, new_leaves = flat_paths(before.trainable), flat_paths(state.trainable)
    for name, old in old_leaves.items():
        assert np.any(np.asarray(old.get_value()) != np.asarray(new_leaves[name].get_value())), name


def test_what_the_model_never_reads_is_not_decayed(model):
    optimizer = make_optimizer(ADAM, 3)
    state, _ = stepper(model, SftLoss(), optimizer)(windows(0, rows=ROWS))
    unused = {name for name in flat_paths(nnx.state(model)) if name.startswith("vision.unused")}
    assert unused == set(flat_paths(state.frozen))
    for name in unused:
        old = flat_paths(nnx.state(model))[name].get_value()
        np.testing.assert_array_equal(old, flat_paths(state.frozen)[name].get_value())


def test_decay_reaches_matrices_only(model):
    """Without gradients, AdamW's update is the decay alone."""
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1, clip=0.0)
    optimizer = make_optimizer(config, 3)
    _, params, _ = split_model(model, ())
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in flat_paths(updates).items():
        vector = name.endswith((".bias", ".scale", "class_token"))
        old = np.asarray(flat_paths(params)[name].get_value())
        wanted = np.zeros_like(old) if vector else -0.05 * old
        np.testing.assert_allclose(update.get_value(), wanted, rtol=1e-5, err_msg=name)


def test_a_pattern_that_freezes_nothing_is_refused(model):
    with pytest.raises(UserError, match=r"model\.freeze.*visoin"):
        split_model(model, ("visoin",))
    with pytest.raises(UserError, match=r"model\.freeze"):
        split_model(model, ("vision(",))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_learning_rate_over_the_run(name):
    """Warm-up to the peak, then down to the final share; read from what one clipped unit gradient moves."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule=name, warmup_ratio=0.2, final_ratio=0.1, weight_decay=0.0, clip=0.0
    )
    steps = 20
    optimizer = make_optimizer(config, steps)
    params = nnx.State({"w": nnx.Param(jnp.zeros(()), axes=())})
    state, rates = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        rates.append(-float(jax.tree.leaves(updates)[0]))
    np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-4)
    tail = np.arange(16) / 16
    wanted = {
        "constant": np.full(16, 0.1),
        "linear": 0.1 - 0.09 * tail,
        "cosine": 0.01 + 0.09 * (1 + np.cos(np.pi * tail)) / 2,
    }[name]
    np.testing.assert_allclose(rates[4:], wanted, rtol=1e-4)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(model):
    """Every remat policy gives the same gradients; bfloat16 gives nearly the same loss."""
    graphdef, _, _ = split_model(model, ())
    optimizer, window = keep_gradients(), windows(0, rows=ROWS)
    state = new_state(model, optimizer, ())

    def run(**options: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=3, **options))(state, window)

    wanted, metrics = run()
    for name in REMAT.keys() - {"none"}:
        assert difference(run(remat=REMAT[name])[0].optimizer, wanted.optimizer) < 1e-5
    rough = run(dtype=jnp.bfloat16)[1]["loss"]
    assert rough != metrics["loss"]
    assert float(rough) == pytest.approx(float(metrics["loss"]), rel=2e-2)


def test_noise_goes_by_step_and_seed(model):
    """The same batch at another step, or under another seed, is buried anew; a resumed step is not."""
    optimizer = keep_gradients()
    graphdef, _, _ = split_model(model, ())
    window = windows(0, rows=ROWS)
    losses = {}
    for seed in (0, 1):
        step = jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=seed))
        state = new_state(model, optimizer, ())
        for number in range(2):
            state, metrics = step(state, window)
            losses[seed, number] = float(metrics["loss"])
    assert len(set(losses.values())) == 4
    resumed = dataclasses.replace(state, step=jnp.int32(1))
    assert float(step(resumed, window)[1]["loss"]) == losses[1, 1]
