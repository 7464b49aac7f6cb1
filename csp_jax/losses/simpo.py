"""SimPO: reference-free preference optimization on length-normalized log-probabilities ([A] 3.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from csp_jax.data.batch import CHOSEN, PLAIN, REJECTED, Batch
from csp_jax.losses.interface import Terms
from csp_jax.losses.logprobs import response_sums
from csp_jax.losses.sft import role_weight


def simpo_losses(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """A pair's loss from mean log-probabilities: `-log sigmoid(beta (chosen - rejected) - simpo_gamma)`."""
    logits = beta * (chosen - rejected) - simpo_gamma
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def pairs(batch: Batch) -> Bool[Array, "batch responses"]:
    """True at each chosen response whose next response is its rejected one."""
    following = jnp.concatenate([batch.role[:, 1:], jnp.zeros_like(batch.role[:, :1])], axis=1)
    return (batch.role == CHOSEN) & (following == REJECTED)


@dataclasses.dataclass(frozen=True)
class SimpoLoss:
    """Mean over pairs, plus `nll_weight` x NLL of chosen responses and `retention` x NLL of plain ones."""

    beta: float = 2.0
    simpo_gamma: float = 1.0
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    retention: float = 1.0

    @property
    def coefficients(self) -> dict[str, float]:
        return {
            "simpo": 1.0,
            "chosen_nll": self.nll_weight,
            "nll": self.retention,
            "pair_accuracy": 0.0,
            "margin": 0.0,
        }

    def counts(self, batch: Batch) -> Terms:
        count = pairs(batch).sum().astype(jnp.float32)
        return {
            "simpo": count,
            "chosen_nll": role_weight(batch, CHOSEN).sum(),
            "nll": role_weight(batch, PLAIN).sum(),
            "pair_accuracy": count,
            "margin": count,
        }

    def sums(self, log_probs: Float[Array, "batch targets"], batch: Batch) -> Terms:
        total, weight = response_sums(log_probs, batch)
        mean = total / jnp.maximum(weight, 1e-9)
        here = pairs(batch)
        rejected = jnp.roll(mean, -1, axis=1)
        losses = simpo_losses(
            mean,
            rejected,
            beta=self.beta,
            simpo_gamma=self.simpo_gamma,
            label_smoothing=self.label_smoothing,
        )
        return {
            "simpo": jnp.where(here, losses, 0.0).sum(),
            "chosen_nll": -(log_probs * role_weight(batch, CHOSEN)).sum(),
            "nll": -(log_probs * role_weight(batch, PLAIN)).sum(),
            "pair_accuracy": jnp.where(here, mean > rejected, False).sum().astype(jnp.float32),
            "margin": jnp.where(here, self.beta * (mean - rejected), 0.0).sum(),
        }
