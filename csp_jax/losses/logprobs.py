"""Log-probabilities of a batch's targets: the vocabulary head on scored slots only, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.models.interface import VisionLanguageModel

HEAD_CHUNK = 1024  # slots whose logits exist at a time, of all rows together


@struct.dataclass
class Scores:
    """Per target: its log-probability (where a batch has choices, that of each), and the token that the model would
    have said there."""

    log_probs: Float[Array, "batch targets *choices"]
    top_token: Int[Array, "batch targets"]


def head_logits(hidden: Float[Array, "... width"], kernel: Float[Array, "width vocab"]) -> Float[Array, "... vocab"]:
    """The vocabulary head, in float32 whatever the precision of what goes in."""
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def head_log_probs(
    hidden: Float[Array, "batch targets width"],
    kernel: Float[Array, "width vocab"],
    tokens: Int[Array, "batch targets *choices"],
    *,
    chunk: int = HEAD_CHUNK,
) -> Scores:
    """Log-softmax of the head at the given tokens, in float32; logits exist for about `chunk` slots at a time: for as
    many of every row, so that rows stay on their devices."""
    rows, count = tokens.shape[:2]
    wanted = tokens.reshape(rows, count, -1)
    parts = -(-count // max(chunk // rows, 1))

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        states, targets = part
        logits = head_logits(states, kernel)
        picked = jnp.take_along_axis(logits, targets, axis=-1)
        return picked - jax.nn.logsumexp(logits, axis=-1, keepdims=True), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def apart(x: Array) -> Array:
        """[rows, targets, ...] -> [parts, rows, some targets, ...]."""
        x = jnp.pad(x, ((0, 0), (0, -count % parts), (0, 0)))
        return jnp.moveaxis(x.reshape(rows, parts, -1, x.shape[-1]), 1, 0)

    def together(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :count]

    if parts <= 1:
        log_probs, top = score((hidden, wanted))
    else:
        log_probs, top = map(together, jax.lax.map(jax.checkpoint(score), (apart(hidden), apart(wanted))))
    return Scores(log_probs.reshape(tokens.shape), top)


def score(
    model: VisionLanguageModel,
    batch: Batch,
    pixels: Float[Array, "batch cells height width 3"] | None,
    *,
    dtype: jnp.dtype = jnp.float32,
    train: bool = False,
    remat: Callable | None = None,
    chunk: int = HEAD_CHUNK,
) -> Scores:
    """The one model call: log-probabilities of all targets of a batch (one prompt and its branches).

    `pixels` are those of `model.pixels`; `train` chooses what a family does in training only.
    """
    prompt = model.embed_prompt(batch, pixels, dtype=dtype, remat=remat)
    return score_prompt(model, batch, prompt, train=train, remat=remat, chunk=chunk)


def score_prompt(
    model: VisionLanguageModel,
    batch: Batch,
    prompt: Float[Array, "batch prompt width"],
    *,
    train: bool = False,
    remat: Callable | None = None,
    chunk: int = HEAD_CHUNK,
) -> Scores:
    """`score` from prompt embeddings that are there already."""
    hidden = model.hidden_states(batch, prompt, train=train, remat=remat)
    tokens = batch.target_token if batch.choices is None else batch.choices
    return head_log_probs(hidden, model.decoder.head_kernel(), tokens, chunk=chunk)


def response_sums(
    log_probs: Float[Array, "batch targets"], batch: Batch
) -> tuple[Float[Array, "batch responses"], Float[Array, "batch responses"]]:
    """Weighted log-probability and weight of each response of each row."""
    responses = batch.role.shape[1]

    def add(values: Array, segment: Array) -> Array:
        return jax.ops.segment_sum(values, segment, num_segments=responses)

    weighted = jax.vmap(add)(log_probs * batch.target_weight, batch.target_response)
    return weighted, jax.vmap(add)(batch.target_weight, batch.target_response)
