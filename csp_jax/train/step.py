"""The one training step: perturb, score, loss, gradient over an accumulation window, update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from csp_jax.data.batch import UNUSED, Batch
from csp_jax.losses.grounding import grounding_counts, grounding_sums
from csp_jax.losses.interface import Loss, Terms
from csp_jax.losses.logprobs import HEAD_CHUNK, score_prompt
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import dropout_key, start_dropout
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


def update(
    state: TrainState, optimizer: optax.GradientTransformation, gradients: nnx.State, total: Array
) -> tuple[TrainState, Array]:
    """The state behind an update and the gradient's norm; an update that is not finite changes no parameter."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

    new_state = TrainState(
        state.step + 1,
        kept(optax.apply_updates(state.trainable, updates), state.trainable),
        state.frozen,
        kept(optimizer_state, state.optimizer),
        state.skipped + jnp.where(finite, 0, 1),
    )
    return new_state, norm


def batch_sizes(window: Batch) -> Metrics:
    """What an update reads and learns from, and how many tokens there is room for: tokens that are not padding (a
    prompt once, however many branches hang from it), pictures, responses that are trained on."""
    trained = window.role > UNUSED
    if window.response_weight is not None:
        trained &= window.response_weight > 0
    return {
        "tokens": jnp.sum(window.prompt_segment > 0) + jnp.sum(window.tokens > 0),
        "images": jnp.sum(window.grid[..., 0] > 0),
        "samples": jnp.sum(trained),
        "slots": jnp.asarray(window.prompt_segment.size + window.tokens.size),
    }


def term_counts(loss: Loss, grounding: bool, batch: Batch) -> Terms:
    """What the sums of a micro-batch are divided by."""
    return {**loss.counts(batch), **(grounding_counts(batch) if grounding else {})}


def make_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Schedule,
    seed: int,
    dtype: jnp.dtype = jnp.float32,
    remat: Callable | None = None,
    head_chunk: int = HEAD_CHUNK,
    grounding: float = 0.0,
    axis: str | None = None,
) -> Step:
    """`step(state, window)`; every array of `window` has a leading axis of micro-batches.

    An update whose loss or gradient is not finite is left out: only the step number and `skipped` change.
    `axis`: the step runs on a part of the rows under a mapped axis of this name (pmap), state replicated.
    """

    coefficients = {**loss.coefficients, **({"grounding": grounding, "slot_accuracy": 0.0} if grounding else {})}

    def whole(parts: Any) -> Any:
        return parts if axis is None else jax.lax.psum(parts, axis)

    def objective(
        trainable: nnx.State, frozen: nnx.State, batch: Batch, keys: tuple[Array, Array], counts: Terms
    ) -> tuple[Array, Terms]:
        model, (key, dropout) = nnx.merge(graphdef, trainable, frozen), keys
        start_dropout(model, dropout)
        pixels = batch_pixels(model, batch, key, schedule)
        prompt = model.embed_prompt(batch, pixels, dtype=dtype, remat=remat)
        sums: Terms = {}
        if loss.coefficients:
            scores = score_prompt(model, batch, prompt, train=True, remat=remat, chunk=head_chunk)
            sums |= loss.sums(scores.log_probs, batch)
        if grounding:
            sums |= grounding_sums(prompt, model.decoder.embed.embedding[...], batch)
        total = sum(weight * sums[name] / counts[name] for name, weight in coefficients.items() if weight != 0.0)
        return jnp.asarray(total), sums

    def step(state: TrainState, window: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout = dropout_key(seed, state.step)
        if axis is not None:
            dropout = jax.random.fold_in(dropout, jax.lax.axis_index(axis))
        counts = whole(jax.tree.map(jnp.sum, jax.vmap(functools.partial(term_counts, loss, bool(grounding)))(window)))
        counts = jax.tree.map(lambda x: jnp.maximum(x, 1e-9), counts)

        def accumulate(carry: tuple[nnx.State, Array, Terms], numbered: tuple[Array, Batch]) -> tuple[tuple, None]:
            (gradients, total, sums), (number, batch) = carry, numbered
            keys = key, jax.random.fold_in(dropout, number)
            (value, new), gradient = jax.value_and_grad(objective, has_aux=True)(
                state.trainable, state.frozen, batch, keys, counts
            )
            added = jax.tree.map(jnp.add, (gradients, total, sums), (gradient, value, new))
            return added, None

        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        start = (zero, jnp.zeros(()), {name: jnp.zeros(()) for name in coefficients})
        numbers = jnp.arange(window.tokens.shape[0])
        gradients, total, sums = whole(jax.lax.scan(accumulate, start, (numbers, window))[0])
        new_state, norm = update(state, optimizer, gradients, total)
        metrics = {
            "loss": total,
            "grad_norm": norm,
            "skipped": new_state.skipped,
            **whole(batch_sizes(window)),
            **{name: sums[name] / counts[name] for name in sums},
        }
        return new_state, metrics

    return step
