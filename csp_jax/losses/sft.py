"""Supervised fine-tuning: token-mean cross-entropy of the responses ([A] 3.3)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from csp_jax.data.batch import CHOSEN, PLAIN, Batch
from csp_jax.losses.interface import Terms


def role_weight(batch: Batch, *roles: int) -> Float[Array, "batch targets"]:
    """Target weights, 0 where the response has none of the roles."""
    role = jnp.take_along_axis(batch.role, batch.target_response, axis=1)
    kept = jnp.zeros(role.shape, bool)
    for wanted in roles:
        kept = kept | (role == wanted)
    return jnp.where(kept, batch.target_weight, 0.0)


@dataclasses.dataclass(frozen=True)
class SftLoss:
    """`-sum(weight * log_prob) / sum(weight)` over the whole window; rejected responses are left out."""

    @property
    def coefficients(self) -> dict[str, float]:
        return {"nll": 1.0}

    def counts(self, batch: Batch) -> Terms:
        return {"nll": role_weight(batch, PLAIN, CHOSEN).sum()}

    def sums(self, log_probs: Float[Array, "batch targets"], batch: Batch) -> Terms:
        return {"nll": -(log_probs * role_weight(batch, PLAIN, CHOSEN)).sum()}
