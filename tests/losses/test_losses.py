"""SFT and SimPO against TRL, ms-swift and torch: values and gradients; chunks of the head; empty responses; pairs."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import GOLDEN

from csp_jax.data.batch import CHOSEN, PLAIN, REJECTED, UNUSED, Batch
from csp_jax.losses.interface import Loss
from csp_jax.losses.logprobs import head_log_probs, response_sums
from csp_jax.losses.sft import SftLoss
from csp_jax.losses.simpo import SimpoLoss, pairs, simpo_losses

LIBRARIES = ("trl", "swift")
PAIRS, STEPS, WORDS = 4, 8, 13

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def arrays(library: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "losses" / f"simpo_{library}.npz"))


@pytest.fixture
def numbers(library: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "losses" / f"simpo_{library}.json").read_text())


def make_batch(token: np.ndarray, weight: np.ndarray, response: np.ndarray, role: np.ndarray) -> Batch:
    """A batch of targets alone; losses look at nothing else."""
    rows = len(token)
    nothing = np.zeros((rows, 0), np.int32)
    return Batch(
        prompt_tokens=nothing,
        prompt_segment=nothing,
        slot_name=nothing[..., None],
        tokens=nothing,
        parent=nothing,
        target_token=np.asarray(token, np.int32),
        target_parent=np.zeros(np.shape(token), np.int32),
        target_weight=np.asarray(weight, np.float32),
        target_response=np.asarray(response, np.int32),
        role=np.asarray(role, np.int32),
        canvas=None,
        mask=None,
        confidence=nothing,
        noise_id=nothing,
        groups=1,
    )


def golden_batch(arrays: dict[str, np.ndarray]) -> tuple[Batch, np.ndarray]:
    """Four rows, each a chosen and a rejected response of eight slots; and the logits of their slots."""
    labels, mask = arrays["labels"][:, 1:], arrays["mask"]
    token = np.where(mask, labels, 0).reshape(2, PAIRS, STEPS)
    weight = mask.reshape(2, PAIRS, STEPS)
    token, weight = (np.concatenate(x, axis=1) for x in (token, weight))
    response = np.broadcast_to(np.repeat([0, 1], STEPS), token.shape)
    logits = np.concatenate(arrays["logits"][:, :-1].reshape(2, PAIRS, STEPS, WORDS), axis=1)
    return make_batch(token, weight, response, np.full((PAIRS, 2), [CHOSEN, REJECTED])), logits


def total(loss: Loss, batch: Batch, logits: Any, chunk: int = 1024) -> jax.Array:
    """The objective as the step forms it, from logits (the head is the identity)."""
    log_probs = head_log_probs(
        jnp.asarray(logits), jnp.eye(logits.shape[-1]), batch.target_token, chunk=chunk
    ).log_probs
    sums, counts = loss.sums(log_probs, batch), loss.counts(batch)
    return sum(w * sums[n] / jnp.maximum(counts[n], 1e-9) for n, w in loss.coefficients.items() if w)


def test_log_probs_and_response_means(arrays, numbers):
    batch, logits = golden_batch(arrays)
    log_probs = head_log_probs(jnp.asarray(logits), jnp.eye(WORDS), batch.target_token).log_probs
    wanted = np.concatenate(arrays["per_token_logps"].reshape(2, PAIRS, STEPS), axis=1)
    used = batch.target_weight > 0
    np.testing.assert_allclose(log_probs[used], wanted[used], rtol=1e-5)
    sums, weight = response_sums(log_probs, batch)
    np.testing.assert_allclose(sums.T.reshape(-1), arrays["sum_logps"], rtol=1e-5)
    np.testing.assert_allclose((sums / weight)[:, 0], numbers["mean_logps_chosen"], rtol=1e-5)
    np.testing.assert_allclose((sums / weight)[:, 1], numbers["mean_logps_rejected"], rtol=1e-5)


def test_simpo_value_and_gradient(arrays, numbers):
    batch, logits = golden_batch(arrays)
    value, gradient = jax.value_and_grad(lambda x: total(SimpoLoss(), batch, x))(jnp.asarray(logits))
    assert float(value) == pytest.approx(numbers["loss_mean"], rel=1e-6)
    wanted = np.concatenate(arrays["grad_logits"][:, :-1].reshape(2, PAIRS, STEPS, WORDS), axis=1)
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)
    assert np.linalg.norm(gradient) == pytest.approx(numbers["grad_l2"], rel=1e-5)


def test_simpo_reports_margin_and_accuracy(arrays, numbers):
    batch, logits = golden_batch(arrays)
    log_probs = head_log_probs(jnp.asarray(logits), jnp.eye(WORDS), batch.target_token).log_probs
    sums, counts = SimpoLoss().sums(log_probs, batch), SimpoLoss().counts(batch)
    assert float(counts["simpo"]) == PAIRS
    assert float(sums["margin"] / counts["margin"]) == pytest.approx(numbers["margin_mean"], rel=1e-5)
    assert float(sums["pair_accuracy"] / counts["pair_accuracy"]) == numbers["accuracy"]


def test_simpo_with_the_chosen_responses_nll(arrays, numbers):
    batch, logits = golden_batch(arrays)
    both = float(total(SimpoLoss(nll_weight=1.0), batch, logits))
    assert both == pytest.approx(numbers["cpo_simpo_alpha1_total"], rel=1e-6)
    assert both - float(total(SimpoLoss(), batch, logits)) == pytest.approx(numbers["nll_chosen_pooled"], rel=1e-5)
    assert SimpoLoss().nll_weight == 0  # SimPO, not CPO-SimPO


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("simpo_ls01", {"label_smoothing": 0.1}),
        ("simpo_b25_g14", {"beta": 2.5, "simpo_gamma": 1.4}),
        ("simpo_b10_g0", {"beta": 10.0, "simpo_gamma": 0.0}),
    ],
)
def test_simpo_variants(arrays, numbers, name, settings):
    variant = numbers["variants"][name]
    assert variant["args"] == settings
    batch, logits = golden_batch(arrays)
    assert float(total(SimpoLoss(**settings), batch, logits)) == pytest.approx(variant["mean"], rel=1e-5)
    chosen, rejected = (jnp.array(numbers[f"mean_logps_{side}"]) for side in ("chosen", "rejected"))
    losses = simpo_losses(chosen, rejected, **{"beta": 2.0, "simpo_gamma": 1.0, **settings})
    np.testing.assert_allclose(losses, variant["losses"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["equal", "huge_pos", "huge_neg", "at_margin"])
def test_simpo_extremes(numbers, name):
    case = numbers["extremes"][name]
    chosen, rejected = jnp.array(case["chosen"]), jnp.array(case["rejected"])

    def loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return simpo_losses(chosen, rejected, beta=2.0, simpo_gamma=1.0).sum()

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(chosen, rejected)
    assert float(value) == pytest.approx(case["loss"][0], rel=1e-6, abs=1e-12)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    margin = 2.0 * (case["chosen"][0] - case["rejected"][0]) - 1.0
    assert float(slopes[0][0]) == pytest.approx(-2.0 / (1.0 + np.exp(margin)), rel=1e-5, abs=1e-12)
    assert float(slopes[1][0]) == -float(slopes[0][0])


def test_an_empty_response_is_no_nan(arrays, numbers):
    """TRL's mean over nothing is NaN; here it is 0 and moves nothing."""
    assert numbers["extremes"]["empty_mask_mean_logp"] == "[nan]"
    batch, logits = golden_batch(arrays)
    batch.target_weight[1, :STEPS] = 0
    value, gradient = jax.value_and_grad(lambda x: total(SimpoLoss(nll_weight=0.5), batch, x))(jnp.asarray(logits))
    assert np.isfinite(float(value))
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[1, :STEPS])
    batch.target_weight[:] = 0
    for loss in (SftLoss(), SimpoLoss(nll_weight=0.5)):
        value, gradient = jax.value_and_grad(lambda x, loss=loss: total(loss, batch, x))(jnp.asarray(logits))
        assert np.isfinite(float(value))
        assert np.all(np.isfinite(gradient))


def test_mirrored_pairs(arrays):
    """Chosen and rejected exchanged: the margin changes its sign, the loss is that of the other side."""
    batch, logits = golden_batch(arrays)
    turned = make_batch(batch.target_token, batch.target_weight, 1 - batch.target_response, batch.role)
    log_probs = head_log_probs(jnp.asarray(logits), jnp.eye(WORDS), batch.target_token).log_probs
    loss = SimpoLoss(simpo_gamma=0.0)
    here, there = loss.sums(log_probs, batch), loss.sums(log_probs, turned)
    assert float(there["margin"]) == pytest.approx(-float(here["margin"]), rel=1e-5)
    assert float(here["pair_accuracy"] + there["pair_accuracy"]) == PAIRS
    # log sigmoid(-x) = log sigmoid(x) - x
    gap = float(there["simpo"] - here["simpo"])
    assert gap == pytest.approx(float(here["margin"]), rel=1e-4)


def test_only_a_rejected_that_follows_a_chosen_makes_a_pair():
    role = [
        [PLAIN, CHOSEN, REJECTED, CHOSEN, REJECTED, UNUSED],
        [REJECTED, CHOSEN, PLAIN, REJECTED, CHOSEN, CHOSEN],
        [REJECTED, UNUSED, CHOSEN, REJECTED, PLAIN, CHOSEN],
    ]
    nothing = np.zeros((3, 1))
    found = pairs(make_batch(nothing, nothing, nothing, np.array(role)))
    assert [list(np.flatnonzero(row)) for row in np.asarray(found)] == [[1, 3], [], [2]]


def random_case(seed: int) -> tuple[Batch, np.ndarray]:
    generator = np.random.default_rng(seed)
    shape = (3, 20)
    roles = [[PLAIN, CHOSEN, REJECTED, PLAIN], [CHOSEN, REJECTED, PLAIN, UNUSED], [PLAIN, UNUSED, UNUSED, UNUSED]]
    response = np.sort(generator.integers(0, [[4], [3], [1]], shape), axis=1)
    weight = generator.choice([0.0, 0.5, 1.0, 2.0], shape)
    batch = make_batch(generator.integers(0, WORDS, shape), weight, response, np.array(roles))
    return batch, generator.standard_normal((*shape, WORDS)).astype(np.float32) * 2


def test_sft_is_torch_cross_entropy():
    """The weighted token mean over plain and chosen responses; the rejected ones are left out."""
    batch, logits = random_case(0)
    value, gradient = jax.value_and_grad(lambda x: total(SftLoss(), batch, x))(jnp.asarray(logits))
    role = np.take_along_axis(batch.role, batch.target_response, axis=1)
    weight = torch.from_numpy(np.where(role == REJECTED, 0, batch.target_weight).astype(np.float32)).reshape(-1)
    wanted_logits = torch.from_numpy(logits).requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        wanted_logits.reshape(-1, WORDS), torch.from_numpy(batch.target_token).long().reshape(-1), reduction="none"
    )
    wanted = (losses * weight).sum() / weight.sum()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, wanted_logits.grad, atol=1e-7)


def test_retention_is_the_plain_responses_nll():
    batch, logits = random_case(1)
    role = np.take_along_axis(batch.role, batch.target_response, axis=1)
    weight = np.where(role == PLAIN, batch.target_weight, 0.0)
    chosen = torch.from_numpy(logits).log_softmax(-1).numpy()
    picked = np.take_along_axis(chosen, batch.target_token[..., None], axis=-1)[..., 0]
    wanted = -(picked * weight).sum() / weight.sum()
    without = float(total(SimpoLoss(retention=0.0), batch, logits))
    for retention in (0.5, 2.0):
        found = float(total(SimpoLoss(retention=retention), batch, logits)) - without
        assert found == pytest.approx(retention * wanted, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 59, 60])
def test_chunks_of_the_head_change_nothing(chunk):
    batch, _ = random_case(2)
    generator = np.random.default_rng(3)
    hidden = generator.standard_normal((3, 20, 6)).astype(np.float32)
    kernel = generator.standard_normal((6, WORDS)).astype(np.float32)

    def value(hidden: jax.Array, kernel: jax.Array, chunk: int) -> tuple[jax.Array, Any]:
        scores = head_log_probs(hidden, kernel, batch.target_token, chunk=chunk)
        return (scores.log_probs * batch.target_weight).sum(), scores

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, whole), whole_slopes = run(hidden, kernel, 1024)
    (_, parts), slopes = run(hidden, kernel, chunk)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-6)
    np.testing.assert_array_equal(parts.top_token, whole.top_token)
    np.testing.assert_array_equal(whole.top_token, (hidden @ kernel).argmax(-1))
    for slope, wanted in zip(slopes, whole_slopes, strict=True):
        np.testing.assert_allclose(slope, wanted, atol=1e-5)
