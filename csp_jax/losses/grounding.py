"""Naming picture slots: what a slot's features are nearest to among the word embeddings.

A small model that is trained from nothing learns to answer long before it learns to look, and stays there. Naming
the object on every slot puts pictures and words into one space from the first step. Pretrained models do not need it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from csp_jax.data.batch import Batch
from csp_jax.losses.interface import Terms


def _unit(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def grounding_sums(
    prompt: Float[Array, "batch prompt width"], embedding: Float[Array, "vocab width"], batch: Batch
) -> Terms:
    """Cross-entropy of the slots' names under scaled cosine similarity (the mean over a slot's names), and how often
    the nearest word is one of them."""
    features, words = _unit(prompt.astype(jnp.float32)), _unit(embedding.astype(jnp.float32))
    logits = features @ words.T * prompt.shape[-1] ** -0.5
    named = batch.slot_name >= 0
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.maximum(batch.slot_name, 0), axis=-1)
    mean = jnp.where(named, log_probs, 0.0).sum(-1) / jnp.maximum(named.sum(-1), 1)
    right = jnp.argmax(logits, axis=-1)[..., None] == batch.slot_name
    return {"grounding": -mean.sum(), "slot_accuracy": right.any(-1).sum().astype(jnp.float32)}


def grounding_counts(batch: Batch) -> Terms:
    """Named slots."""
    count = (batch.slot_name >= 0).any(-1).sum().astype(jnp.float32)
    return {"grounding": count, "slot_accuracy": count}


@dataclasses.dataclass(frozen=True)
class NoLoss:
    """No loss on responses: the decoder is not run, grounding alone trains."""

    @property
    def coefficients(self) -> dict[str, float]:
        return {}

    def counts(self, batch: Batch) -> Terms:
        return {}

    def sums(self, log_probs: Float[Array, "batch targets"], batch: Batch) -> Terms:
        return {}
