"""GRPO against TRL, ms-swift and tunix: advantages, losses, gradients and named variants; filtered groups."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GOLDEN

from csp_jax.data.batch import PLAIN, UNUSED, Batch
from csp_jax.errors import UserError
from csp_jax.losses.grpo import VARIANTS, GrpoLoss, group_advantages

FOLDER = GOLDEN / "losses"
TRL, TUNIX, SWIFT, REAL = (
    json.loads((FOLDER / f"grpo_{name}.json").read_text()) for name in ("trl", "tunix", "swift", "advantages_trl_real")
)
CASES = [("trl", name) for name in TRL["cases"]] + [("tunix", name) for name in TUNIX["cases"]]


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "grpo_inputs.npz"))


def grouped(rewards: np.ndarray) -> np.ndarray:
    return rewards.reshape(-1, 4)


def make_batch(mask: np.ndarray, responses: int = 4, **policy: Any) -> Batch:
    """A row for each prompt, its responses one after another; losses look at nothing else."""
    rows, length = len(mask) // responses, mask.shape[1]
    nothing = np.zeros((rows, 0), np.int32)
    weight = mask.reshape(rows, responses * length).astype(np.float32)
    return Batch(
        prompt_tokens=nothing,
        prompt_segment=nothing,
        slot_name=nothing[..., None],
        tokens=nothing,
        parent=nothing,
        target_token=np.zeros(weight.shape, np.int32),
        target_parent=np.zeros(weight.shape, np.int32),
        target_weight=weight,
        target_response=np.broadcast_to(np.repeat(np.arange(responses), length), weight.shape),
        role=np.full((rows, responses), PLAIN, np.int32),
        canvas=None,
        mask=None,
        confidence=nothing,
        noise_id=nothing,
        groups=responses,
        **policy,
    )


def rows(values: np.ndarray, responses: int = 4) -> np.ndarray:
    return values.reshape(len(values) // responses, -1)


def golden_batch(inputs: dict[str, np.ndarray], rewards: str, *, old: bool, epsilon: float = 1e-4) -> Batch:
    advantage, _ = group_advantages(grouped(inputs[rewards]), epsilon=epsilon)
    return make_batch(
        inputs["mask"],
        old_log_probs=rows(inputs["old"]) if old else None,
        reference_log_probs=rows(inputs["ref"]),
        advantage=advantage,
    )


def objective(loss: GrpoLoss, batch: Batch, log_probs: Any) -> jax.Array:
    sums, counts = loss.sums(log_probs, batch), loss.counts(batch)
    return sum(weight * sums[name] / counts[name] for name, weight in loss.coefficients.items() if weight)


# --- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rewards", "rewards2"])
def test_advantages_of_three_libraries(inputs, name):
    found, kept = group_advantages(grouped(inputs[name]))
    for library in (TRL, SWIFT):
        np.testing.assert_allclose(found.reshape(-1), library[f"advantages_{name}"], atol=1e-6)
    finer, _ = group_advantages(grouped(inputs[name]), epsilon=1e-6)
    np.testing.assert_allclose(finer.reshape(-1), TUNIX[f"advantages_{name}"], atol=1e-6)
    assert kept.tolist() == ([True, False] if name == "rewards" else [True, True])
    for scale in ("group", "batch", "none"):
        found, _ = group_advantages(grouped(inputs[name]), scale=scale)
        np.testing.assert_allclose(found.reshape(-1), REAL[f"{name}_{scale}"], atol=1e-6)


def test_equal_rewards_up_to_rounding_have_no_spread():
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3, 0.31]])
    advantages, kept = group_advantages(rewards)
    assert kept.tolist() == [False, True]
    assert not np.any(advantages[0])
    assert advantages[1, 3] > 1


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="two responses"):
        group_advantages(np.zeros((3, 1)))


# --- losses and gradients -------------------------------------------------------------------------------------------


def settings(library: str, args: dict[str, Any], inputs: dict[str, np.ndarray]) -> GrpoLoss:
    if library == "tunix":
        mean = {"sequence-mean-token-mean": "response", "token-mean": "token"}[args["agg"]]
        return GrpoLoss(beta=args["beta"], kl={"low_var_kl": "k3", "kl": "k1"}[args["kl_loss_mode"]], mean=mean)
    variant = dict(VARIANTS[args["loss_type"]])
    if args["importance_sampling_level"] == "sequence":
        assert variant == VARIANTS["grpo"]
        variant = dict(VARIANTS["gspo"])
    clip = {"clip_low": args["epsilon_low"], "clip_high": args["epsilon_high"], "ratio_limit": args["delta"]}
    return GrpoLoss(beta=args["beta"], **clip, **variant, longest=int(inputs["max_completion_length"]))


@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_losses_and_gradients_of_other_libraries(inputs, library, name):
    case = {"trl": TRL, "tunix": TUNIX}[library]["cases"][name]
    args = case["args"]
    old = args.get("old_given", "onpolicy" not in name)
    batch = golden_batch(inputs, "rewards" if "rewards1" in name else "rewards2", old=old, epsilon=1e-4)
    loss = settings(library, args, inputs)
    value, gradient = jax.value_and_grad(lambda x: objective(loss, batch, x))(jnp.asarray(rows(inputs["new"])))
    share = args.get("ga", 1)  # TRL divides a micro-batch's loss by the number of micro-batches
    assert float(value) / share == pytest.approx(case["loss"], rel=1e-4, abs=1e-6)
    wanted = rows(np.array(case["grad"], np.float32))
    np.testing.assert_allclose(np.asarray(gradient) / share, wanted, atol=1e-5 * np.abs(wanted).max() + 2e-7)


def test_every_named_variant_is_held_by_a_case():
    named = {args["loss_type"] for args in (case["args"] for case in TRL["cases"].values())} | {"gspo"}
    assert named == set(VARIANTS)


def test_reported_kl_and_clipping(inputs):
    batch, loss = golden_batch(inputs, "rewards2", old=True), GrpoLoss()
    sums, counts = loss.sums(jnp.asarray(rows(inputs["new"])), batch), loss.counts(batch)
    found = {name: float(sums[name] / counts[name]) for name in sums}
    wanted = TUNIX["cases"]["grpo_k3_b0.04"]
    assert found["kl"] == pytest.approx(wanted["kl"], rel=1e-5)
    assert found["clipped_low"] + found["clipped_high"] == pytest.approx(wanted["pg_clipfrac"], rel=1e-5)
    assert found["filtered"] == 0
    k3 = np.array(TRL["k3_per_token"])
    assert found["kl"] == pytest.approx((k3 * inputs["mask"]).sum() / inputs["mask"].sum(), rel=1e-5)


def test_defaults_are_the_papers():
    loss = GrpoLoss()
    assert (loss.clip_low, loss.clip_high, loss.kl, loss.mean, loss.ratio) == (0.2, 0.28, "k3", "response", "token")


# --- our own properties ---------------------------------------------------------------------------------------------


LOSSES = [GrpoLoss(**VARIANTS[name], longest=6) for name in ("grpo", "dapo", "dr_grpo", "gspo")]


@pytest.mark.parametrize("loss", LOSSES, ids=["grpo", "dapo", "dr_grpo", "gspo"])
def test_finite_differences(inputs, loss):
    """In float64; away from the corners of the clip."""
    with jax.enable_x64(True):
        batch = golden_batch(inputs, "rewards2", old=True)
        point = rows(inputs["new"]).astype(np.float64)
        run = jax.jit(lambda x: objective(loss, batch, x))
        gradient = np.asarray(jax.grad(run)(point))
        generator = np.random.default_rng(0)
        for _ in range(5):
            direction = generator.standard_normal(point.shape)
            slope = (float(run(point + 1e-6 * direction)) - float(run(point - 1e-6 * direction))) / 2e-6
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES, ids=["grpo", "dapo", "dr_grpo", "gspo"])
def test_a_filtered_group_is_as_if_it_were_not_there(inputs, loss):
    """Whatever its tokens say, inf included; and it is counted."""
    whole = golden_batch(inputs, "rewards", old=True)
    _, kept = group_advantages(grouped(inputs["rewards"]))
    weight = np.repeat(kept[:, None], 4, axis=1).astype(np.float32)
    filtered = dataclasses.replace(whole, response_weight=weight)
    new = rows(inputs["new"]).copy()
    first = make_batch(
        inputs["mask"][:4],
        old_log_probs=whole.old_log_probs[:1],
        reference_log_probs=whole.reference_log_probs[:1],
        advantage=whole.advantage[:1],
    )
    wanted, slope = jax.value_and_grad(lambda x: objective(loss, first, x))(jnp.asarray(new[:1]))
    new[1] = [-np.inf, 1e4] * 12
    found, gradient = jax.value_and_grad(lambda x: objective(loss, filtered, x))(jnp.asarray(new))
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    np.testing.assert_allclose(gradient[0], slope[0], rtol=1e-6)
    assert not np.any(gradient[1])
    sums, counts = loss.sums(jnp.asarray(new), filtered), loss.counts(filtered)
    assert float(sums["filtered"] / counts["filtered"]) == 0.5
    # left in, its KL would have counted
    assert float(objective(loss, whole, jnp.asarray(rows(inputs["new"])))) != pytest.approx(float(wanted), rel=1e-3)


def test_all_filtered_or_empty_is_no_nan(inputs):
    batch = golden_batch(inputs, "rewards", old=True)
    nothing = dataclasses.replace(batch, response_weight=np.zeros((2, 4), np.float32))
    empty = dataclasses.replace(batch, role=np.full((2, 4), UNUSED, np.int32))
    for case in (nothing, empty):
        sums, counts = GrpoLoss().sums(jnp.asarray(rows(inputs["new"])), case), GrpoLoss().counts(case)
        assert float(counts["grpo"]) == float(sums["grpo"]) == 0
    hole = inputs["mask"].copy()
    hole[2] = 0  # a response without a token: in no mean
    batch = make_batch(hole, advantage=group_advantages(grouped(inputs["rewards2"]))[0])
    loss = GrpoLoss(beta=0.0)
    assert float(loss.counts(batch)["grpo"]) == 7
    assert np.isfinite(float(objective(loss, batch, jnp.asarray(rows(inputs["new"])))))


def test_sums_add_over_micro_batches(inputs):
    """Accumulated is full batch: sums and counts of rows add up."""
    whole = golden_batch(inputs, "rewards2", old=True)
    new = jnp.asarray(rows(inputs["new"]))
    for loss in LOSSES:
        parts = []
        for row in range(2):
            fields = {
                f: getattr(whole, f)[row : row + 1] for f in ("old_log_probs", "reference_log_probs", "advantage")
            }
            part = make_batch(inputs["mask"][4 * row : 4 * row + 4], **fields)
            parts.append((loss.sums(new[row : row + 1], part), loss.counts(part)))
        sums, counts = loss.sums(new, whole), loss.counts(whole)
        for name in sums:
            assert float(parts[0][0][name] + parts[1][0][name]) == pytest.approx(float(sums[name]), rel=1e-5, abs=1e-7)
            assert float(parts[0][1][name] + parts[1][1][name]) == float(counts[name])


def test_what_is_missing_is_said(inputs):
    batch = golden_batch(inputs, "rewards2", old=True)
    new = jnp.asarray(rows(inputs["new"]))
    with pytest.raises(ValueError, match="no advantages"):
        GrpoLoss().sums(new, dataclasses.replace(batch, advantage=None))
    with pytest.raises(ValueError, match="no reference"):
        GrpoLoss().sums(new, dataclasses.replace(batch, reference_log_probs=None))
    with pytest.raises(UserError, match="longest"):
        GrpoLoss(mean="length")
