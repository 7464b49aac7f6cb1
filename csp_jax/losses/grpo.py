"""GRPO: policy optimization on advantages within a group of sampled responses ([B] eq. 4), and its named relatives.

mean over responses of  mean over tokens of
    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + beta KL(policy || reference)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from csp_jax.data.batch import UNUSED, Batch
from csp_jax.errors import UserError
from csp_jax.losses.interface import Terms
from csp_jax.losses.logprobs import response_sums

SPREAD = 1e-6  # rewards of a group that differ by less are equal

# What other programs call these settings; the defaults are GRPO as [B] writes it.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "bnpo": {"mean": "token"},
    "dapo": {"mean": "token"},
    "dr_grpo": {"mean": "length"},
    "gspo": {"ratio": "sequence"},
    "cispo": {"mean": "token", "surrogate": "cispo"},
}


def group_advantages(
    rewards: Float[np.ndarray, "groups size"],
    *,
    epsilon: float = 1e-4,
    scale: Literal["group", "batch", "none"] = "group",
) -> tuple[Float[np.ndarray, "groups size"], Bool[np.ndarray, " groups"]]:
    """`(reward - mean) / (std + epsilon)` within each group, and which groups have any spread at all.

    The standard deviation has one degree of freedom taken off; `scale` takes it over the group, over all rewards, or
    leaves it out. A group without spread teaches nothing (its advantages are 0): it is to be sampled again or given
    `response_weight` 0. UserError: groups of one response.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape[1] < 2:
        raise UserError("a group needs two responses", field="group size", value=rewards.shape[1], mend="Sample more")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = np.ptp(rewards, axis=1) > SPREAD
    if scale == "group":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + epsilon)
    elif scale == "batch":
        centred = centred / (rewards.std(ddof=1) + epsilon)
    return np.where(spread[:, None], centred, 0.0).astype(np.float32), spread


@dataclasses.dataclass(frozen=True)
class GrpoLoss:
    """The clipped objective with its KL term inside the token mean.

    The batch brings `advantage`, and, where the policy has moved since it sampled, `old_log_probs`; without them the
    ratio is 1 and has the policy's gradient. `reference_log_probs` are needed where beta is not 0. Responses with
    `response_weight` 0 (groups without spread) are left out of every mean and counted in `filtered`.

    `mean`: over the tokens of a response and then over responses, over all tokens, or of sums of tokens divided by
    `longest`. `ratio`: of tokens, or the geometric mean of a response's. `kl`: the estimator. `surrogate` cispo: the
    ratio is cut off at `clip_high` itself and weighs the log-probability's gradient. `ratio_limit` bounds the ratio
    where the advantage is negative.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.04
    kl: Literal["k3", "k1"] = "k3"
    mean: Literal["response", "token", "length"] = "response"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clipped", "cispo"] = "clipped"
    ratio_limit: float | None = None
    longest: int = 0

    def __post_init__(self) -> None:
        if self.mean == "length" and self.longest < 1:
            raise UserError("needs the longest response", field="longest", value=self.longest, mend="Set it")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"grpo": 1.0, "kl": 0.0, "clipped_low": 0.0, "clipped_high": 0.0, "filtered": 0.0}

    def counts(self, batch: Batch) -> Terms:
        kept, tokens = _kept(batch), _token_weight(batch).sum()
        responses = kept.sum()
        whole = {"response": responses, "token": tokens, "length": responses * self.longest}[self.mean]
        sampled = (batch.role != UNUSED).sum().astype(jnp.float32)
        return {"grpo": whole, "kl": tokens, "clipped_low": tokens, "clipped_high": tokens, "filtered": sampled}

    def sums(self, log_probs: Float[Array, "batch targets"], batch: Batch) -> Terms:
        if batch.advantage is None:
            raise ValueError("the batch has no advantages")
        weight = _token_weight(batch)
        used = weight > 0
        # What is not trained on may hold anything: it must not become inf or nan on the way to weight 0.
        log_probs = jnp.where(used, log_probs, 0.0)
        advantage = jnp.take_along_axis(batch.advantage, batch.target_response, axis=1)
        ratio = jnp.exp(self._log_ratio(log_probs, batch, used))
        low, high = 1 - self.clip_low, 1 + self.clip_high
        kl = self._kl(log_probs, batch, used)
        losses = self._surrogate(log_probs, ratio, advantage) + self.beta * kl
        if self.mean == "response":
            total, tokens = response_sums(losses, batch)
            whole = (_kept(batch) * total / jnp.maximum(tokens, 1e-9)).sum()
        else:
            whole = (losses * weight).sum()
        return {
            "grpo": whole,
            "kl": (kl * weight).sum(),
            "clipped_low": jnp.where((ratio < low) & (advantage < 0), weight, 0.0).sum(),
            "clipped_high": jnp.where((ratio > high) & (advantage > 0), weight, 0.0).sum(),
            "filtered": ((batch.role != UNUSED) & (_response_weight(batch) == 0)).sum().astype(jnp.float32),
        }

    def _log_ratio(self, log_probs: Array, batch: Batch, used: Array) -> Float[Array, "batch targets"]:
        old = jax.lax.stop_gradient(log_probs) if batch.old_log_probs is None else batch.old_log_probs
        change = jnp.where(used, log_probs - old, 0.0)
        if self.ratio == "token":
            return change
        total, tokens = response_sums(change, batch)
        return jnp.take_along_axis(total / jnp.maximum(tokens, 1e-9), batch.target_response, axis=1)

    def _surrogate(self, log_probs: Array, ratio: Array, advantage: Array) -> Float[Array, "batch targets"]:
        if self.surrogate == "cispo":
            return -jax.lax.stop_gradient(jnp.minimum(ratio, self.clip_high)) * advantage * log_probs
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        bounded = ratio if self.ratio_limit is None else jnp.minimum(ratio, self.ratio_limit)
        return -jnp.minimum(bounded * advantage, clipped * advantage)

    def _kl(self, log_probs: Array, batch: Batch, used: Array) -> Float[Array, "batch targets"]:
        """Estimates of KL(policy || reference): k3 is `exp(d) - d - 1` with d = reference - policy, k1 is -d."""
        if batch.reference_log_probs is None:
            if self.beta:
                raise ValueError("the batch has no reference log-probabilities")
            return jnp.zeros_like(log_probs)
        difference = jnp.where(used, batch.reference_log_probs - log_probs, 0.0)
        return jnp.exp(difference) - difference - 1 if self.kl == "k3" else -difference


def _response_weight(batch: Batch) -> Float[Array, "batch responses"]:
    """1 for responses that are trained on: those that are there, unless the batch says otherwise."""
    there = jnp.asarray(batch.role != UNUSED, jnp.float32)
    return there if batch.response_weight is None else there * batch.response_weight


def _kept(batch: Batch) -> Float[Array, "batch responses"]:
    """Weights of responses that are trained on and have tokens."""
    _, tokens = response_sums(jnp.zeros_like(batch.target_weight), batch)
    return jnp.where(tokens > 0, _response_weight(batch), 0.0)


def _token_weight(batch: Batch) -> Float[Array, "batch targets"]:
    return batch.target_weight * jnp.take_along_axis(_response_weight(batch), batch.target_response, axis=1)
