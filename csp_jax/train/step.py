"""The one training step: perturb, score, loss, gradient over an accumulation window, update."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from csp_jax.data.batch import Batch
from csp_jax.losses.grounding import grounding_counts, grounding_sums
from csp_jax.losses.interface import Loss, Terms
from csp_jax.losses.logprobs import score_prompt
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import Schedule, perturb
from csp_jax.train.state import TrainState

Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def batch_pixels(model: VisionLanguageModel, batch: Batch, key: Array, schedule: Schedule) -> Array | None:
    """Normalized pixel values of a batch, its key objects buried."""
    if batch.canvas is None:
        return None
    canvas = perturb(batch.canvas, batch.mask, batch.confidence, batch.noise_id, key, schedule)
    return model.pixels(batch, canvas)


def make_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Schedule,
    seed: int,
    dtype: jnp.dtype = jnp.float32,
    remat: Callable | None = None,
    grounding: float = 0.0,
) -> Step:
    """`step(state, window)`; every array of `window` has a leading axis of micro-batches."""

    coefficients = {**loss.coefficients, **({"grounding": grounding, "slot_accuracy": 0.0} if grounding else {})}

    def count(batch: Batch) -> Terms:
        return {**loss.counts(batch), **(grounding_counts(batch) if grounding else {})}

    def objective(
        trainable: nnx.State, frozen: nnx.State, batch: Batch, key: Array, counts: Terms
    ) -> tuple[Array, Terms]:
        model = nnx.merge(graphdef, trainable, frozen)
        pixels = batch_pixels(model, batch, key, schedule)
        prompt = model.embed_prompt(batch, pixels, dtype=dtype, remat=remat)
        sums: Terms = {}
        if loss.coefficients:
            sums |= loss.sums(score_prompt(model, batch, prompt, train=True, remat=remat).log_probs, batch)
        if grounding:
            sums |= grounding_sums(prompt, model.decoder.embed.embedding[...], batch)
        total = sum(weight * sums[name] / counts[name] for name, weight in coefficients.items() if weight != 0.0)
        return jnp.asarray(total), sums

    def step(state: TrainState, window: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        counts = jax.tree.map(lambda x: jnp.maximum(x.sum(), 1e-9), jax.vmap(count)(window))

        def accumulate(carry: tuple[nnx.State, Array, Terms], batch: Batch) -> tuple[tuple, None]:
            gradients, total, sums = carry
            (value, new), gradient = jax.value_and_grad(objective, has_aux=True)(
                state.trainable, state.frozen, batch, key, counts
            )
            added = jax.tree.map(jnp.add, (gradients, total, sums), (gradient, value, new))
            return added, None

        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        start = (zero, jnp.zeros(()), {name: jnp.zeros(()) for name in coefficients})
        (gradients, total, sums), _ = jax.lax.scan(accumulate, start, window)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        metrics = {
            "loss": total,
            "grad_norm": optax.global_norm(gradients),
            **{name: sums[name] / counts[name] for name in sums},
        }
        new_state = TrainState(
            state.step + 1, optax.apply_updates(state.trainable, updates), state.frozen, optimizer_state
        )
        return new_state, metrics

    return step
