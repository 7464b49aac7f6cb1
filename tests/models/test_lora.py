"""Adapters: a golden step of PEFT's, what trains and what does not, dropout, switching off, merging, every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from family_batches import trained
from flax import nnx
from golden_folders import FAMILIES
from golden_llava import SHAPE, TINY, all_logits, golden_sample, whole_prompts
from tiny import change, difference, jitted_score, pack, stack, tiny_model
from tiny_families import family_model

from csp_jax.config import OptimizerConfig, ParallelConfig
from csp_jax.data.batch import Batch, Branch, Sample, Shape
from csp_jax.errors import UserError
from csp_jax.losses.logprobs import score
from csp_jax.losses.sft import SftLoss
from csp_jax.models.blocks import Linear
from csp_jax.models.hub import flat_paths
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.llava import Llava
from csp_jax.models.lora import (
    LoraLinear,
    LoraParam,
    adapted,
    adapter_off,
    add_adapter,
    linear_layers,
    merge_adapter,
    start_dropout,
)
from csp_jax.models.peft import hub_modules, load_adapter
from csp_jax.models.registry import load_model
from csp_jax.perturb import Schedule
from csp_jax.sharding import compile_step, make_mesh, put_batch, state_shardings
from csp_jax.train import step as step_module
from csp_jax.train.configured import make_optimizer
from csp_jax.train.state import TrainState, decay_mask, new_state, split_model
from csp_jax.train.step import make_step

GOLDEN_LORA = json.loads((TINY / "golden_lora.json").read_text())
DECODER = (r"decoder\.(layers|last)\.",)

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture(scope="module")
def io() -> dict[str, np.ndarray]:
    return dict(np.load(TINY / "io.npz")) | {f"lora/{k}": v for k, v in np.load(TINY / "lora_io.npz").items()}


@pytest.fixture
def golden_model() -> Llava:
    model = load_model(TINY)
    load_adapter(model, TINY / "lora")
    return model


@pytest.fixture(scope="module")
def pixels(io: dict[str, np.ndarray]) -> np.ndarray:
    return io["pixel_values"].transpose(0, 2, 3, 1)[:, None]


def random_b(model: VisionLanguageModel, seed: int = 0, size: float = 0.3) -> VisionLanguageModel:
    """The model with an adapter that does something."""
    generator = np.random.default_rng(seed)
    for _, layer in adapted(model):
        layer.lora_b[...] = jnp.asarray(generator.normal(0, size, layer.lora_b.shape).astype(np.float32))
    return model


def adapter_leaves(model: VisionLanguageModel, state: nnx.State) -> dict[str, np.ndarray]:
    """Leaves of an adapter (or their gradients) under PEFT's names, for models whose modules are not fused."""
    leaves = {path: np.asarray(leaf.get_value()) for path, leaf in flat_paths(state).items()}
    found = {}
    for name, (part, *_) in hub_modules(model).items():
        for letter in "AB":
            path = f"{part.path}.lora_{letter.lower()}"
            if path in leaves:
                value = leaves[path] if part.number is None else leaves[path][part.number]
                found[f"{name}.lora_{letter}.default.weight"] = value.T
    return found


# --- PEFT's golden step ----------------------------------------------------------------------------------------------


def test_golden_logits(golden_model, io, pixels):
    mask = io["chosen_mask"] == 1
    logits = all_logits(golden_model, whole_prompts(io["chosen_ids"], io["chosen_mask"]), pixels)
    wanted = io["lora/logits"]
    np.testing.assert_allclose(logits[mask], wanted[mask], atol=1e-4 * wanted.std(), rtol=0)
    plain = all_logits(adapter_off(golden_model), whole_prompts(io["chosen_ids"], io["chosen_mask"]), pixels)
    assert np.abs(plain[mask] - wanted[mask]).max() > 100 * 1e-4 * wanted.std()
    np.testing.assert_array_equal(
        plain, all_logits(load_model(TINY), whole_prompts(io["chosen_ids"], io["chosen_mask"]), pixels)
    )


def golden_step(model: Llava, io: dict[str, np.ndarray], monkeypatch: Any, optimizer: Any, pixels: np.ndarray) -> Any:
    """One step of the real step function on the golden pixel values; the state before, after, and the metrics."""
    shape = Shape(**{**vars(SHAPE), "pictures": 1, "canvas": (1, 1)})
    batch = pack(shape, [golden_sample(io, row) for row in range(4)], share_rows=False)
    batch = change(batch, noise_id=np.arange(4, dtype=np.uint32)[:, None])
    monkeypatch.setattr(step_module, "batch_pixels", lambda *unused: jnp.asarray(pixels))
    graphdef, _, _ = split_model(model, ())
    state = new_state(model, optimizer, ())
    after, metrics = jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=0))(
        state, stack([batch])
    )
    return state, after, metrics


def keep_gradients() -> optax.GradientTransformation:
    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def test_golden_loss_and_gradients(golden_model, io, pixels, monkeypatch):
    _, after, metrics = golden_step(golden_model, io, monkeypatch, keep_gradients(), pixels)
    assert float(metrics["loss"]) == pytest.approx(GOLDEN_LORA["loss"], rel=1e-5)
    found = adapter_leaves(golden_model, after.optimizer)
    wanted = {key.removeprefix("lora/grad/"): value for key, value in io.items() if key.startswith("lora/grad/")}
    assert set(found) == set(wanted)
    assert len(wanted) == 2 * GOLDEN_LORA["n_modules"]
    assert sum(value.size for value in found.values()) == GOLDEN_LORA["trainable"]
    for name, want in wanted.items():
        assert np.linalg.norm(found[name] - want) < 1e-4 * np.linalg.norm(want), name


def test_golden_update(golden_model, io, pixels, monkeypatch):
    """A step of AdamW from PEFT's gradients, made by PyTorch; clipping sees the adapter's gradients alone."""
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", beta2=0.999, epsilon=1e-4, weight_decay=0.1)
    before, after, metrics = golden_step(golden_model, io, monkeypatch, make_optimizer(config, 1), pixels)
    start = adapter_leaves(golden_model, before.trainable)
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.from_numpy(io[f"lora/grad/{name}"].copy())
    norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    torch.optim.AdamW(tensors.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.1).step()
    found = adapter_leaves(golden_model, after.trainable)
    for name, tensor in tensors.items():
        moved = tensor.detach().numpy() - start[name]
        assert np.linalg.norm(found[name] - start[name] - moved) < 1e-3 * np.linalg.norm(moved), name
        np.testing.assert_allclose(found[name], tensor.detach(), atol=1e-4 * np.abs(start[name]).max(), err_msg=name)


# --- what trains -----------------------------------------------------------------------------------------------------


def test_only_the_adapter_trains_and_has_optimizer_state(golden_model, io, pixels, monkeypatch):
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 1)
    before, after, _ = golden_step(golden_model, io, monkeypatch, optimizer, pixels)
    names = {f"{path}.lora_{letter}" for path, _ in adapted(golden_model) for letter in "ab"}
    assert set(flat_paths(after.trainable)) == names
    moments = [leaf.shape for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim]
    adapter = [leaf.shape for leaf in jax.tree.leaves(after.trainable)]
    assert sorted(moments) == sorted(adapter * 2)
    base = flat_paths(nnx.state(load_model(TINY)))
    assert set(flat_paths(after.frozen)) == set(base)
    for name, leaf in flat_paths(after.frozen).items():
        np.testing.assert_array_equal(leaf.get_value(), base[name].get_value(), err_msg=name)
    for name, leaf in flat_paths(after.trainable).items():
        assert np.any(np.asarray(leaf.get_value()) != np.asarray(flat_paths(before.trainable)[name].get_value())), name
    assert all(leaf.get_value() for leaf in flat_paths(decay_mask(after.trainable)).values())


def test_a_new_adapter_starts_as_peft_starts_it():
    """A uniform in +-1 / sqrt(in), layer by layer anew; B zero: nothing changes yet."""
    model = tiny_model(hidden_size=64, num_hidden_layers=4)
    wanted = all_logits(model, *small_inputs(model))
    add_adapter(model, DECODER, rank=32, alpha=8, seed=1)
    layers = dict(adapted(model))
    assert len(layers) == 14
    assert layers["decoder.layers.mlp.up"].lora_a.shape == (3, 64, 32)
    assert layers["decoder.last.mlp.down"].lora_b.shape == (32, 64)
    assert layers["decoder.last.attention.key"].scale == 0.25
    for layer in layers.values():
        a = np.asarray(layer.lora_a[...])
        bound = a.shape[-2] ** -0.5
        assert np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.any(layer.lora_b[...])
    stack = np.asarray(layers["decoder.layers.mlp.up"].lora_a[...])
    assert len({part.tobytes() for part in stack}) == 3
    np.testing.assert_array_equal(all_logits(model, *small_inputs(model)), wanted)
    other = tiny_model(hidden_size=64, num_hidden_layers=4)
    add_adapter(other, DECODER, rank=32, alpha=8, seed=2)
    assert np.any(np.asarray(dict(adapted(other))["decoder.last.mlp.up"].lora_a[...]) != stack[0])


def small_inputs(model: Llava) -> tuple[Batch, None]:
    generator = np.random.default_rng(5)
    return whole_prompts(generator.integers(4, 90, (2, 9)), np.ones((2, 9), int)), None


def test_peft_draws_a_from_the_same_distribution():
    """PEFT's A of a linear layer of 64 inputs: torch's kaiming_uniform_(a=sqrt(5))."""
    weight = torch.empty(512, 64)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5)
    model = tiny_model(hidden_size=64)
    add_adapter(model, (r"decoder\.last\.mlp\.up$",), rank=512, alpha=1)
    ((_, layer),) = adapted(model)
    ours = np.sort(np.asarray(layer.lora_a[...]).reshape(-1))
    np.testing.assert_allclose(ours, np.sort(weight.numpy().reshape(-1)), atol=4e-3)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ((r"decoder\.layers\.attention\.(query|value)$",), 2),
        ((r"decoder\.last", "projector"), 9),
        (("vision",), 6),  # not the patches, which are a convolution, and not the layers that are never run
        (("",), 22),
    ],
)
def test_targets_are_patterns_on_linear_layers(targets, count):
    model = tiny_model()
    add_adapter(model, targets, rank=2, alpha=2)
    paths = [path for path, _ in adapted(model)]
    assert len(paths) == count
    assert not [path for path in paths if "unused" in path or path in ("decoder.head", "vision.patch")]


@pytest.mark.parametrize("targets", [("decodr",), (r"decoder\.head",), ("vision.patch",), ("vision(",)])
def test_targets_that_match_nothing_are_named(targets):
    with pytest.raises(UserError, match=r"model\.lora\.targets") as caught:
        add_adapter(tiny_model(), targets, rank=2, alpha=2)
    assert caught.value.value == targets[0]


def test_a_second_adapter_is_refused():
    model = tiny_model()
    add_adapter(model, DECODER, rank=2, alpha=2)
    with pytest.raises(UserError, match="already"):
        add_adapter(model, DECODER, rank=2, alpha=2)


# --- off, merged -----------------------------------------------------------------------------------------------------


def test_off_is_the_base_bit_for_bit_and_shares_its_arrays():
    model, base = tiny_model(), tiny_model()
    add_adapter(model, ("",), rank=3, alpha=6, dropout=0.5)
    random_b(model)
    off = adapter_off(model)
    batch, pixels = picture_batch()
    on = jitted_score(model, batch, pixels).log_probs
    np.testing.assert_array_equal(
        jitted_score(off, batch, pixels).log_probs, jitted_score(base, batch, pixels).log_probs
    )
    assert np.abs(np.asarray(on - jitted_score(base, batch, pixels).log_probs)).max() > 0.1
    np.testing.assert_array_equal(jitted_score(model, batch, pixels).log_probs, on)  # and is still on
    mine, theirs = (flat_paths(nnx.state(m)) for m in (model, off))
    assert all(mine[name].get_value() is theirs[name].get_value() for name in mine)


def test_policy_and_reference_in_one_program():
    """Off inside a compiled function, where GRPO needs it: one set of parameters, two graphs."""
    model, base = tiny_model(), tiny_model()
    add_adapter(model, DECODER, rank=3, alpha=6)
    random_b(model)
    batch, pixels = picture_batch()
    graphdef, state = nnx.split(model)

    @jax.jit
    def both(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        policy = nnx.merge(graphdef, state)
        return score(policy, batch, pixels).log_probs, score(adapter_off(policy), batch, pixels).log_probs

    policy, reference = both(state)
    np.testing.assert_allclose(policy, jitted_score(model, batch, pixels).log_probs, atol=1e-5)
    np.testing.assert_allclose(reference, jitted_score(base, batch, pixels).log_probs, atol=1e-5)


def picture_batch(rows: int = 2) -> tuple[Batch, np.ndarray]:
    generator = np.random.default_rng(7)
    samples = []
    for _ in range(rows):
        words = [int(word) for word in generator.integers(4, 96, 9)]
        prompt = (1, 3, 3, 3, 3, *words[:3])
        samples.append(Sample(prompt, (), ((Branch(tuple(words[3:]), (1.0,) * 6),),)))
    batch = pack(Shape(rows, 10, 1, 6, 8, 2, 0, None), samples, share_rows=False)
    return batch, generator.standard_normal((rows, 1, 28, 28, 3)).astype(np.float32)


def test_merged_is_wrapped():
    model = tiny_model()
    add_adapter(model, ("",), rank=3, alpha=6)
    random_b(model)
    untouched = jax.tree.leaves(nnx.state(model))
    merged = merge_adapter(model)
    assert all(old is new for old, new in zip(untouched, jax.tree.leaves(nnx.state(model)), strict=True))
    assert not list(adapted(merged))
    assert list(adapted(model))
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(tiny_model()))
    batch, pixels = picture_batch()
    wanted = np.asarray(jitted_score(model, batch, pixels).log_probs)
    np.testing.assert_allclose(jitted_score(merged, batch, pixels).log_probs, wanted, atol=1e-5, rtol=1e-5)
    half = tiny_model()
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(half))
    nnx.update(half, state)
    add_adapter(half, DECODER, rank=3, alpha=6)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(merge_adapter(half)))} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.variables(half, LoraParam))} == {np.dtype(np.float32)}


# --- dropout ---------------------------------------------------------------------------------------------------------


def one_layer(rate: float, features: int = 400) -> LoraLinear:
    base = Linear(features, features, scale=0.0, rngs=nnx.Rngs(0))
    eye = jnp.eye(features)
    return LoraLinear(base, eye, eye, scale=1.0, dropout=rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (50, 400)).astype(np.float32))
    layer = one_layer(rate)
    np.testing.assert_allclose(layer(x), x, rtol=1e-6)  # without a key: off
    start_dropout(layer, jax.random.key(1))
    y = np.asarray(layer(x))
    zero = y == 0
    deviation = (rate * (1 - rate) / zero.size) ** 0.5
    assert abs(zero.mean() - rate) < 4 * deviation
    np.testing.assert_allclose(y[~zero], (np.asarray(x) / (1 - rate))[~zero], rtol=1e-6)
    np.testing.assert_array_equal(layer(x), y)
    start_dropout(layer, jax.random.key(2))
    assert np.any((np.asarray(layer(x)) == 0) != zero)


def test_each_layer_of_a_stack_and_each_path_drops_its_own():
    model = tiny_model()
    add_adapter(model, DECODER, rank=2, alpha=2, dropout=0.5)
    start_dropout(model, jax.random.key(0))
    keys = [np.asarray(jax.random.key_data(layer.dropout_key[...])).reshape(-1, 2) for _, layer in adapted(model)]
    flat = np.concatenate(keys)
    assert len(flat) == 7 * 3
    assert len({key.tobytes() for key in flat}) == len(flat)


def dropout_stepper(model: Llava, seed: int = 0) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    graphdef, _, _ = split_model(model, ())
    return jax.jit(make_step(graphdef, SftLoss(), keep_gradients(), schedule=Schedule(), seed=seed))


def test_dropout_goes_by_seed_step_and_micro_batch(monkeypatch):
    model = tiny_model()
    add_adapter(model, DECODER, rank=2, alpha=8, dropout=0.5)
    random_b(model)
    batch, pixels = picture_batch()
    monkeypatch.setattr(step_module, "batch_pixels", lambda *unused: jnp.asarray(pixels))
    batch = change(batch, canvas=np.zeros((2, 0, 1, 1, 3), np.uint8), mask=np.zeros((2, 0, 1, 1), bool))
    step, start = dropout_stepper(model), new_state(model, keep_gradients(), ())

    def loss(state: TrainState, window: Batch, run: Any = step) -> float:
        return float(run(state, window)[1]["loss"])

    one, two = stack([batch]), stack([batch, batch])
    first = loss(start, one)
    assert loss(start, one) == first  # resumed
    later = step(start, one)[0]
    assert loss(later, one) != first
    assert loss(start, one, dropout_stepper(model, seed=1)) != first
    # the second micro-batch drops other values than the first: the mean of two is not the first's loss
    assert loss(start, two) != pytest.approx(first, rel=1e-4)
    for _, layer in adapted(model):
        layer.dropout = 0.0
    still = dropout_stepper(model)
    assert loss(start, two, still) == pytest.approx(loss(start, one, still), rel=1e-6)


@pytest.mark.slow
def test_recomputing_activations_drops_the_same(monkeypatch):
    model = tiny_model()
    add_adapter(model, DECODER, rank=2, alpha=8, dropout=0.5)
    random_b(model)
    batch, pixels = picture_batch()
    monkeypatch.setattr(step_module, "batch_pixels", lambda *unused: jnp.asarray(pixels))
    batch = change(batch, canvas=np.zeros((2, 0, 1, 1, 3), np.uint8), mask=np.zeros((2, 0, 1, 1), bool))
    graphdef, _, _ = split_model(model, ())
    state, ends = new_state(model, keep_gradients(), ()), []
    for remat in (None, jax.checkpoint):
        step = make_step(graphdef, SftLoss(), keep_gradients(), schedule=Schedule(), seed=0, remat=remat)
        ends.append(jax.jit(step)(state, stack([batch]))[0].optimizer)
    assert difference(ends[1], ends[0]) < 1e-5


# --- sharding, families ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices_are_one(monkeypatch):
    monkeypatch.setattr("csp_jax.sharding.SMALLEST_SHARDED", 1)
    batch, pixels = picture_batch(rows=8)
    monkeypatch.setattr(step_module, "batch_pixels", lambda *unused: jnp.asarray(pixels))
    batch = change(batch, canvas=np.zeros((8, 0, 1, 1, 3), np.uint8), mask=np.zeros((8, 0, 1, 1), bool))
    model = tiny_model()
    add_adapter(model, DECODER, rank=4, alpha=8, dropout=0.2)
    random_b(model)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant", epsilon=1e-3), 2)
    graphdef, _, _ = split_model(model, ())
    step = make_step(graphdef, SftLoss(), optimizer, schedule=Schedule(), seed=0)
    ends = []
    for config, devices in ((ParallelConfig(data=1), 1), (ParallelConfig(fsdp=2, tensor=2), 8)):
        mesh = make_mesh(config, jax.devices()[:devices])
        state = new_state(model, optimizer, ())
        shardings = state_shardings(mesh, state)
        state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
        compiled = compile_step(step, mesh, shardings)
        for _ in range(2):
            state, metrics = compiled(state, put_batch(stack([batch]), mesh))
        ends.append((state, float(metrics["loss"])))
    (one, loss), (eight, other) = ends
    assert other == pytest.approx(loss, rel=1e-5)
    assert difference(eight.trainable, one.trainable) < 1e-5
    up = flat_paths(eight.trainable)
    a, b = (up[f"decoder.layers.mlp.up.lora_{letter}"].get_value().sharding.spec for letter in "ab")
    assert a == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert b[2] == "tensor"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_an_adapter(family):
    before, after, losses = trained(family, ("decoder", "vision"), steps=4)
    assert losses[-1] < 0.9 * losses[0]
    frozen = flat_paths(before.frozen)
    for name, leaf in flat_paths(after.frozen).items():
        np.testing.assert_array_equal(leaf.get_value(), frozen[name].get_value(), err_msg=name)
    for name, leaf in flat_paths(after.trainable).items():
        moved = np.asarray(leaf.get_value()) != np.asarray(flat_paths(before.trainable)[name].get_value())
        assert np.any(moved), name


def test_the_head_and_what_is_no_module_of_its_own_are_no_targets():
    """PEFT could not name an adapter on an attention's joint weight or on a bare parameter."""
    paths = linear_layers(family_model("qwen_vl"))
    assert "vision.resampler.enter" in paths
    assert not {"vision.resampler.query", "vision.project", "vision.patch", "decoder.head"} & set(paths)
