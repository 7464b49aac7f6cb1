"""LLaVA against numbers that PyTorch (transformers, TRL) computed: logits, losses, gradients, trajectories."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_llava import LLAVA15, SHAPE, TINY, all_logits, golden_sample, whole_prompts
from safetensors.numpy import load_file
from tiny import change, jitted_score, pack, stack

from csp_jax.config import OptimizerConfig
from csp_jax.data.batch import Batch, Shape
from csp_jax.losses.interface import Loss
from csp_jax.losses.logprobs import response_sums, score
from csp_jax.losses.sft import SftLoss
from csp_jax.losses.simpo import SimpoLoss
from csp_jax.models.hub import canonical_key, flat_paths, hub_arrays
from csp_jax.models.llava import Llava
from csp_jax.models.registry import load_model
from csp_jax.perturb import Schedule
from csp_jax.train import step as step_module
from csp_jax.train.configured import make_optimizer
from csp_jax.train.state import new_state, split_model

NUMBERS = json.loads((TINY / "golden.json").read_text())
NUMBERS_SFT = json.loads((TINY / "golden_sft.json").read_text())

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture(scope="module")
def io() -> dict[str, np.ndarray]:
    return dict(np.load(TINY / "io.npz"))


@pytest.fixture(scope="module")
def model() -> Llava:
    return load_model(TINY)


@pytest.fixture(scope="module")
def pixels(io: dict[str, np.ndarray]) -> np.ndarray:
    """[rows, one picture, height, width, 3]"""
    return io["pixel_values"].transpose(0, 2, 3, 1)[:, None]


@pytest.fixture(scope="module")
def pairs(io: dict[str, np.ndarray]) -> Batch:
    return pack(SHAPE, [golden_sample(io, row) for row in range(4)], share_rows=False)


def loss_of(model: Llava, loss: Loss) -> Callable[[nnx.State, Batch, Any], jax.Array]:
    graphdef = nnx.graphdef(model)

    def value(state: nnx.State, batch: Batch, pixels: Any) -> jax.Array:
        sums = loss.sums(score(nnx.merge(graphdef, state), batch, pixels).log_probs, batch)
        counts = loss.counts(batch)
        return sum(w * sums[n] / counts[n] for n, w in loss.coefficients.items() if w)

    return value


def gradients(model: Llava, loss: Loss, batch: Batch, pixels: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients under the hub's names."""
    value, gradient = jax.jit(jax.value_and_grad(loss_of(model, loss)))(nnx.state(model), batch, pixels)
    return float(value), hub_arrays(gradient, Llava.tensors(model.config))


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_with_padding_on_either_side(model, io, pixels, side):
    name = {"right": "chosen", "left": "left"}[side]
    mask = io[f"{name}_mask"] == 1
    logits = all_logits(model, whole_prompts(io[f"{name}_ids"], io[f"{name}_mask"]), pixels)
    wanted = io[f"logits_chosen_{side}"]
    np.testing.assert_allclose(logits[mask], wanted[mask], atol=1e-4 * wanted.std(), rtol=0)


def test_vision_features(model, io, pixels):
    graphdef, state = nnx.split(model)

    @jax.jit
    def encode(state: nnx.State, pixels: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state)
        return model.encode_images(pixels), model.vision(pixels[:, 0])

    features, tower = encode(state, pixels)
    np.testing.assert_allclose(features, io["image_features"], atol=1e-5)
    np.testing.assert_allclose(tower, io["vision_hidden_m2"][:, 1:], atol=1e-5)


def test_mean_log_probs_of_chosen_and_rejected_as_branches(model, pairs, pixels):
    sums, weight = response_sums(jitted_score(model, pairs, pixels).log_probs, pairs)
    wanted = np.array(NUMBERS["simpo_mean_logps"]).reshape(2, 4).T
    np.testing.assert_allclose(sums / weight, wanted, rtol=1e-5)


def test_left_padded_prompts_score_alike(model, io, pairs, pixels):
    """Moving every prompt to the right end of its row changes positions in the row, and nothing else."""
    moved = {name: np.array(getattr(pairs, name)) for name in Batch.ARRAYS if getattr(pairs, name) is not None}
    for row, length in enumerate((pairs.prompt_segment > 0).sum(axis=1)):
        shift = SHAPE.prompt - length
        for name in ("prompt_tokens", "prompt_segment"):
            moved[name][row] = np.roll(moved[name][row], shift)
        for name in ("parent", "target_parent"):
            moved[name][row] += np.where(moved[name][row] < SHAPE.prompt, shift, 0)
    sums, weight = response_sums(jitted_score(model, change(pairs, **moved), pixels).log_probs, pairs)
    wanted = np.array(NUMBERS["simpo_mean_logps"]).reshape(2, 4).T
    np.testing.assert_allclose(sums / weight, wanted, rtol=1e-5)


def test_greedy_tokens_are_the_top_tokens(model, io, pixels):
    ids = np.concatenate([io["gen_prompt_ids"], io["gen_tokens"]], axis=1)
    mask = np.concatenate([io["gen_prompt_mask"], np.ones_like(io["gen_tokens"])], axis=1)
    top = jitted_score(model, whole_prompts(ids, mask), pixels).top_token
    start = io["gen_prompt_ids"].shape[1] - 1
    np.testing.assert_array_equal(top[:, start : start + 6], io["gen_tokens"])
    assert NUMBERS["greedy_tokens"] == io["gen_tokens"].tolist()


def check_norms(found: dict[str, np.ndarray], wanted: dict[str, float]) -> None:
    wanted = {canonical_key(name, Llava.aliases): norm for name, norm in wanted.items()}
    unused = {canonical_key(name, Llava.aliases) for name in NUMBERS["params_without_grad"]}
    assert set(found) == set(wanted) | unused
    for name, norm in wanted.items():
        # a key's bias shifts all logits of a query alike: its gradient is rounding noise
        assert np.linalg.norm(found[name]) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    assert all(not np.any(found[name]) for name in unused)


def test_sft_loss_and_gradients(model, pairs, pixels):
    loss, found = gradients(model, SftLoss(), pairs, pixels)
    assert loss == pytest.approx(NUMBERS["sft_loss"], rel=1e-5)
    total = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in found.values()))
    assert total == pytest.approx(NUMBERS["sft_grad_norm"], rel=1e-5)
    check_norms(found, NUMBERS["sft_grad_l2"])


def test_simpo_losses_and_gradients(model, io, pairs, pixels):
    loss, found = gradients(model, SimpoLoss(retention=0.0), pairs, pixels)
    assert loss == pytest.approx(NUMBERS["simpo_loss"], rel=1e-5)
    check_norms(found, NUMBERS["simpo_grad_l2"])
    total = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in found.values()))
    assert total == pytest.approx(NUMBERS["simpo_grad_norm"], rel=1e-5)
    layer = "language_model.model.layers.0.self_attn.q_proj.weight"
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    for name, wanted in (
        ("language_model.lm_head.weight", io["simpo_grad_lm_head"]),
        (layer, io["simpo_grad_q0"]),
        ("multi_modal_projector.linear_1.weight", io["simpo_grad_proj1"]),
        (patch, io["simpo_grad_patch"]),
    ):
        np.testing.assert_allclose(found[name], wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_simpo_loss_of_each_pair(model, io, pixels):
    one = Shape(**{**vars(SHAPE), "rows": 1})
    value = jax.jit(loss_of(model, SimpoLoss(retention=0.0)))
    found = [
        float(value(nnx.state(model), pack(one, [golden_sample(io, row)]), pixels[row : row + 1])) for row in range(4)
    ]
    assert found == pytest.approx(NUMBERS["simpo_losses"], rel=1e-5)


def test_what_gets_no_gradient_in_torch_is_frozen_here(model):
    _, trainable, frozen = split_model(model, ())
    keys = {tensor.path: tensor.keys for tensor in Llava.tensors(model.config)}
    names = {key for path in flat_paths(frozen) for key in keys[path]}
    assert names == {canonical_key(name, Llava.aliases) for name in NUMBERS["params_without_grad"]}
    assert set(flat_paths(trainable)) | set(flat_paths(frozen)) == set(keys)


def trajectory(
    model: Llava, io: dict, pixels: np.ndarray, monkeypatch: Any, loss: Loss, windows: list[list[int]], **optimizer: Any
) -> tuple[dict[str, list[float]], float]:
    """Six steps of the real step on the golden pixel values; metrics, and the norm of all parameters after."""
    shape = Shape(**{**vars(SHAPE), "rows": len(windows[0]), "pictures": 1, "canvas": (1, 1)})
    batches = []
    for rows in windows:
        batch = pack(shape, [golden_sample(io, row) for row in rows], share_rows=False)
        batches.append(change(batch, noise_id=np.array(rows, np.uint32)[:, None]))
    config = OptimizerConfig(learning_rate=1e-3, schedule="constant", beta1=0.9, beta2=0.999, epsilon=1e-8, **optimizer)
    update = make_optimizer(config, 6)
    # golden pixel values are not bytes: they go in where the perturbed pictures would come out
    monkeypatch.setattr(
        step_module, "batch_pixels", lambda model, batch, key, schedule: jnp.asarray(pixels)[batch.noise_id[:, 0]]
    )
    graphdef, _, _ = split_model(model, ())
    step = jax.jit(step_module.make_step(graphdef, loss, update, schedule=Schedule(), seed=0))
    state, history = new_state(model, update, ()), []
    for _ in range(6):
        state, metrics = step(state, stack(batches))
        history.append(metrics)
    leaves = jax.tree.leaves((state.trainable, state.frozen))
    size = float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves)))
    return {name: [float(metrics[name]) for metrics in history] for name in history[0]}, size


def test_sft_trajectory(model, io, pixels, monkeypatch):
    found, _ = trajectory(model, io, pixels, monkeypatch, SftLoss(), [[0, 2], [1, 3]], weight_decay=0.0, clip=1.0)
    assert found["loss"] == pytest.approx(NUMBERS_SFT["trl_sft_loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(NUMBERS_SFT["trl_sft_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["traj_simpo_wd0_clip1", "traj_simpo_wd0.01_clip1", "traj_simpo_wd0_noclip"])
def test_simpo_trajectory(model, io, pixels, monkeypatch, name):
    wanted = NUMBERS[name]
    args = wanted["args"]
    assert (args["lr"], args["order"]) == (1e-3, "0,1|2,3 every step")
    found, size = trajectory(
        model,
        io,
        pixels,
        monkeypatch,
        SimpoLoss(),
        [[0, 1], [2, 3]],
        weight_decay=args["weight_decay"],
        clip=args["max_grad_norm"],
    )
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert found["margin"] == pytest.approx(wanted["margins"], rel=1e-4)
    assert found["pair_accuracy"] == pytest.approx([0.75] + [1.0] * 5)
    assert size == pytest.approx(wanted["final_param_l2"], rel=1e-6)


@pytest.mark.parametrize("case", ["single", "text_only"])
def test_llava15_logits(case):
    golden = load_file(LLAVA15 / f"{case}.safetensors")
    pixels = np.load(LLAVA15 / "px0.npz")["pixel_values"] if case == "single" else None
    batch = whole_prompts(golden["input_ids"], golden["attention_mask"])
    if pixels is not None:
        pixels = pixels.transpose(0, 2, 3, 1)[:, None]
    logits = all_logits(load_model(LLAVA15), batch, pixels)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4 * golden["logits"].std(), rtol=0)
    top = logits[:, -1].argmax(axis=-1)
    assert top == golden["generated"][:, 0]
