"""What a window asks for, counted on the batch itself: images, samples, tokens, useful FLOPs.

A sample is one response that is trained on or scored. `tokens` are computed: a prompt that several responses share
counts once. `sequence_tokens` are those of the same responses, and of every answer in a tree, as separate sequences:
what programs compute that do not share.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from csp_jax.data.batch import UNUSED, Batch
from csp_jax.losses.logprobs import score
from csp_jax.models.decoder import DecoderConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.rollout import Sampling, continue_batch, sample_batch
from csp_jax.train.flops import product_flops, traced_flops
from csp_jax.train.loop import Run
from csp_jax.train.step import batch_sizes


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one call of a task. `slots`: places for tokens that are computed, padding included."""

    images: int = 0
    samples: int = 0
    tokens: int = 0
    sequence_tokens: int = 0
    slots: int = 0
    flops: float | None = None
    program_bytes: int | None = None


def flat(batch: Batch) -> Batch:
    """A window's micro-batches as the rows of one batch."""
    lead = batch.prompt_tokens.ndim - 2
    return jax.tree.map(lambda x: x.reshape(math.prod(x.shape[: lead + 1]), *x.shape[lead + 1 :]), batch)


def micro_batches(window: Batch) -> list[Batch]:
    """A window's micro-batches, without what policies bring."""
    nothing: dict[str, Any] = dict.fromkeys(Batch.POLICY)
    plain = dataclasses.replace(window, **nothing)
    return [jax.tree.map(lambda x, n=n: x[n], plain) for n in range(len(window.prompt_tokens))]


def seen_tokens(batch: Batch) -> Int[np.ndarray, "rows tokens"]:
    """How many tokens each prompt and branch token sees, itself included; 0 for padding."""
    rows, size = batch.prompt_segment.shape
    seen = np.zeros((rows, size + batch.tokens.shape[1]), int)
    for place in range(size):
        goes_on = place > 0 and batch.prompt_segment[:, place] == batch.prompt_segment[:, place - 1]
        before = np.where(goes_on, seen[:, place - 1], 0)
        seen[:, place] = np.where(batch.prompt_segment[:, place] > 0, before + 1, 0)
    for place in range(batch.tokens.shape[1]):
        before = seen[np.arange(rows), batch.parent[:, place]]
        seen[:, size + place] = np.where(batch.tokens[:, place] > 0, before + 1, 0)
    return seen


def window_work(window: Batch) -> Work:
    """Everything but the FLOPs of a batch or a window of micro-batches (arrays of the host)."""
    batch = flat(window)
    seen, sizes = seen_tokens(batch), batch_sizes(batch)
    scored = batch.target_weight > 0
    there = np.zeros(batch.role.shape, bool)
    there[np.nonzero(scored)[0], batch.target_response[scored]] = True
    fed = _edges(batch.parent, batch.tokens)[batch.tokens > 0]
    said = batch.target_token[..., None] if batch.choices is None else batch.choices
    after = _edges(np.broadcast_to(batch.target_parent[..., None], said.shape), said)
    ends = scored[..., None] & ~np.isin(after, fed)  # nothing follows: a sequence's last
    ends[..., 1:] &= said[..., 1:] > 0
    lengths = np.take_along_axis(seen, batch.target_parent, axis=1) + 1
    return Work(
        samples=int(((batch.role != UNUSED) & there).sum()),
        sequence_tokens=int((lengths * ends.sum(axis=-1)).sum()),
        **{name: int(sizes[name]) for name in ("images", "tokens", "slots")},
    )


def _edges(parent: Int[np.ndarray, "rows ..."], token: Int[np.ndarray, "rows ..."]) -> Int[np.ndarray, "rows ..."]:
    """A number for each row, parent and token that follows it."""
    row = np.arange(len(parent)).reshape(-1, *[1] * (parent.ndim - 1))
    return (row << 48) + (parent.astype(np.int64) << 24) + token


def windows_work(batches: Sequence[Batch]) -> Work:
    """Of several, all together."""
    parts = [window_work(batch) for batch in batches]
    names = ("images", "samples", "tokens", "sequence_tokens", "slots")
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in names})


def hidden_pairs(batch: Batch, layers: int) -> float:
    """Pairs of a query and a key that all layers compute and the masks then forbid.

    The last layer has a query for each target alone.
    """
    seen, (rows, size) = seen_tokens(batch), batch.prompt_segment.shape
    fed, scored = batch.tokens.shape[1], batch.target_parent.shape[1]
    reach = size + (fed // batch.groups if batch.groups else 0)
    there = np.where(batch.target_weight > 0, np.take_along_axis(seen, batch.target_parent, axis=1), 0)
    below = rows * (size**2 + fed * reach) - float(seen.sum())
    return (layers - 1) * below + rows * scored * reach - float(there.sum())


def hidden_flops(text: DecoderConfig, window: Batch, *, backward: bool) -> float:
    """Of those pairs: a product with keys and one with values, two more of each backward."""
    pairs = hidden_pairs(flat(window), text.num_layers)
    return 2 * 2.0 * pairs * text.num_heads * text.head_dim * (3 if backward else 1)


def step_flops(run: Run, window: Batch) -> float:
    """Useful FLOPs of one update (see `train.flops`); pairs that masks forbid are taken off."""
    text = nnx.merge(run.graphdef, run.state.trainable, run.state.frozen).decoder.config
    whole = traced_flops(run.config, run.graphdef, run.state, window, run.mesh)
    return whole - hidden_flops(text, window, backward=True)


def _countable(model: VisionLanguageModel) -> tuple[nnx.GraphDef[VisionLanguageModel], nnx.State]:
    """A model's structure with plain attention, for products within a kernel cannot be counted, and its state."""
    graphdef, state = nnx.split(model)
    alike = nnx.merge(graphdef, jax.eval_shape(lambda x: x, state))
    alike.attention = "xla"
    return nnx.graphdef(alike), state


def forward_flops(model: VisionLanguageModel, batches: Sequence[Batch], dtype: jnp.dtype) -> float:
    """Useful FLOPs of scoring batches of one shape."""
    graphdef, state = _countable(model)

    def scores(state: nnx.State, batch: Batch) -> Any:
        model = nnx.merge(graphdef, state)
        return score(model, batch, model.clean_pixels(batch), dtype=dtype)

    one = product_flops(jax.make_jaxpr(scores)(state, batches[0]).jaxpr)
    return sum(one - hidden_flops(model.decoder.config, batch, backward=False) for batch in batches)


def texts_flops(model: VisionLanguageModel, batches: Sequence[Batch], sampling: Sampling, dtype: jnp.dtype) -> float:
    """Useful FLOPs of continuing every target of batches of one shape by all tokens that may be said."""
    graphdef, state = _countable(model)
    traced = jax.make_jaxpr(functools.partial(continue_batch, graphdef, sampling, dtype))(state, batches[0])
    one = product_flops(traced.jaxpr, loops=sampling.max_tokens - 1)
    return sum(one - hidden_flops(model.decoder.config, batch, backward=False) for batch in batches)


def sampler_flops(run: Run, sampling: Sampling, prompts: Batch, said: float) -> float:
    """Useful FLOPs of sampling `said` tokens of each sample of a batch of prompts (its branches are not read)."""
    samples = run.config.rollout.samples
    states = (run.state.trainable, run.state.frozen)
    trace = functools.partial(sample_batch, run.graphdef, sampling, jnp.dtype(run.config.model.dtype))
    seeds = np.zeros((len(prompts.prompt_tokens), samples), np.uint32)
    traced = jax.make_jaxpr(trace)(states, prompts, seeds)
    merged = nnx.merge(run.graphdef, *states)
    nothing = np.zeros((len(seeds), 0), np.int32)
    alone = dataclasses.replace(prompts, groups=0, tokens=nothing, parent=nothing)
    last = np.argmax(np.where(prompts.prompt_segment > 0, np.arange(prompts.prompt_segment.shape[1]), -1), axis=1)
    alone = dataclasses.replace(alone, target_parent=last[:, None], target_weight=np.ones(last[:, None].shape))
    masked = hidden_flops(merged.decoder.config, alone, backward=False)
    return product_flops(traced.jaxpr, loops=max(said - 1, 0)) - masked
