"""Attention over one prompt and its branches.

A row holds a prompt (one or more packed segments) and `groups` trees of branch tokens. A prompt token attends
causally within its segment. A branch token attends to the prompt up to the token that its tree hangs from,
and to its own ancestors. Softmax runs once over both kinds of keys, so nothing has to be merged afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from csp_jax.models.blocks import keep
from csp_jax.models.interval_attention import NOTHING, Outputs, interval_attention, merge
from csp_jax.models.splash import splash_attention
from csp_jax.sharding import split_kernel

NEGATIVE = -1e30
BOTH_WAYS = "both_ways"  # the scope of attention that is not causal, in the names of what is compiled

# Besides `xla`. Kernels of ours for all queries on the prompt's keys; and who computes the prompt's own attention.
# The second of each pair is the same without the hardware, for tests.
KERNELS: dict[str, Callable[..., Outputs]] = {
    "pallas": interval_attention,
    "pallas_interpret": functools.partial(interval_attention, interpret=True),
    "splash": splash_attention,
    "splash_interpret": functools.partial(splash_attention, interpret=True),
}
LIBRARIES: dict[str, Literal["cudnn", "xla"]] = {"cudnn": "cudnn", "cudnn_by_xla": "xla"}


@struct.dataclass
class Layout:
    """Who sees whom, derived once a batch from segments and parent pointers.

    `root`: the prompt index from which a branch token's tree hangs. `depth`: its distance from that prompt
    token. `ancestors`: within its group, the tokens that a branch token sees, itself included. `first`, `last`: the
    interval of prompt tokens that each token sees, those of the prompt before those of the branches; empty for padding.
    """

    root: Int[Array, "batch branch"]
    depth: Int[Array, "batch branch"]
    ancestors: Bool[Array, "batch groups length length"]
    first: Int[Array, "batch tokens"]
    last: Int[Array, "batch tokens"]
    size: int = struct.field(pytree_node=False)  # of the prompt
    groups: int = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False, default="xla")


@struct.dataclass
class Span:
    """The interval of tokens that each token sees, for one of `KERNELS`; empty for padding."""

    first: Int[Array, "batch tokens"]
    last: Int[Array, "batch tokens"]
    backend: str = struct.field(pytree_node=False)


def segment_span(segment: Int[Array, "batch tokens"], backend: str) -> Span:
    """Every token sees its whole segment; 0 is padding."""
    first = segment_starts(segment)
    last = segment.shape[1] - 1 - segment_starts(segment[:, ::-1])[:, ::-1]
    return Span(jnp.where(segment > 0, first, 1), jnp.where(segment > 0, last, 0), backend)


def whole_span(x: Float[Array, "batch tokens width"], backend: str) -> Span | None:
    """Every token sees all of its row; None where plain attention, which needs no mask for that, computes it."""
    if backend not in KERNELS:
        return None
    first = jnp.zeros(x.shape[:2], jnp.int32)
    return Span(first, first + x.shape[1] - 1, backend)


def segment_starts(segment: Int[Array, "batch prompt"]) -> Int[Array, "batch prompt"]:
    """Index at which each prompt token's segment begins."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    starts = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def prompt_interval(
    segment: Int[Array, "batch prompt"], root: Int[Array, "batch queries"]
) -> tuple[Int[Array, "batch queries"], Int[Array, "batch queries"]]:
    """First and last prompt key that a query hanging from prompt index `root` sees: its segment's, not later."""
    start = jnp.where(segment > 0, segment_starts(segment), segment.shape[1])
    return jnp.take_along_axis(start, root, axis=1), root


def interval_mask(
    first: Int[Array, "... queries"], last: Int[Array, "... queries"], size: int
) -> Bool[Array, "... queries prompt"]:
    """Intervals of `size` keys as a mask."""
    index = jnp.arange(size)
    return (first[..., None] <= index) & (index <= last[..., None])


def tree_layout(
    segment: Int[Array, "batch prompt"], parent: Int[Array, "batch branch"], groups: int, backend: str = "xla"
) -> Layout:
    """Roots, depths, ancestors and intervals from the parent pointers, by pointer doubling in log2(length) rounds."""
    batch, prompt = segment.shape
    length = parent.shape[1] // groups if groups else 0
    pointer = parent.reshape(batch, groups, length)
    first = prompt + length * jnp.arange(groups)[None, :, None]
    jump = pointer - first  # index of the parent within the group; negative: the parent is in the prompt
    root = jnp.where(jump < 0, pointer, 0)
    index = jnp.arange(length)
    ancestors = (jump[..., None] == index) | (index[:, None] == index)
    for _ in range(max(length - 1, 0).bit_length()):
        inside = jump >= 0
        target = jnp.maximum(jump, 0)
        above = jnp.take_along_axis(ancestors, target[..., None], axis=2)
        ancestors = ancestors | (above & inside[..., None])
        root = jnp.where(inside, jnp.maximum(root, jnp.take_along_axis(root, target, axis=2)), root)
        jump = jnp.where(inside, jnp.take_along_axis(jump, target, axis=2), jump)
    root = root.reshape(batch, groups * length)
    depth = jnp.sum(ancestors, axis=-1, dtype=jnp.int32).reshape(batch, groups * length)
    everywhere = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))
    first, last = prompt_interval(segment, jnp.concatenate([everywhere, root], axis=1))
    return Layout(root, depth, ancestors, first, last, size=prompt, groups=groups, backend=backend)


def _grouped(q: Float[Array, "... tokens heads dim"], kv_heads: int) -> Float[Array, "... tokens kv rep dim"]:
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def attend(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    mask: Bool[Array, "batch queries keys"] | None,
) -> Float[Array, "batch queries heads dim"]:
    """Plain masked attention; logits and softmax in float32; a query that sees nothing gives zeros."""
    logits = jnp.einsum("bqgrd,bkgd->bgrqk", _grouped(q, k.shape[2]), k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, NEGATIVE)
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        weights = jnp.where(mask[:, None, None], weights, 0.0)
    return keep(jnp.einsum("bgrqk,bkgd->bqgrd", weights.astype(v.dtype), v).reshape(q.shape))


def attend_alone(
    q: Float[Array, "batch prompt heads dim"],
    k: Float[Array, "batch prompt kv_heads dim"],
    v: Float[Array, "batch prompt kv_heads dim"],
    first: Int[Array, "batch prompt"],
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "batch prompt heads dim"]:
    """Causal attention of prompts that have a row each, by `jax.nn.dot_product_attention`; zeros for padding.

    `first` is that of `prompt_interval`. All that the library is told are lengths, so a row that is anything but one
    prompt and padding behind it gives NaN: no prompt is read as part of another.
    """
    size = q.shape[1]
    real = first < size
    lengths = real.sum(axis=1, dtype=jnp.int32)
    alone = (first == jnp.where(jnp.arange(size) < lengths[:, None], 0, size)).all(axis=1)
    some = jnp.maximum(lengths, 1)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=some, key_value_seq_lengths=some, implementation=implementation
    )
    out = jnp.where(real[..., None, None], out, 0)
    return keep(jnp.where(alone[:, None, None, None], out, jnp.nan))


def attend_span(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    span: Span,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention of each token to an interval of them, by the kernel; zeros for padding."""
    with jax.named_scope(BOTH_WAYS):
        return split_kernel(KERNELS[span.backend], k.shape[2])(q, k, v, span.first, span.last)[0]


def attend_tree(
    q: Float[Array, "batch groups queries heads dim"],
    prompt_kv: tuple[Array, Array],
    branch_kv: tuple[Array, Array],
    prompt_mask: Bool[Array, "batch groups queries prompt"],
    branch_mask: Bool[Array, "batch groups queries length"],
) -> Float[Array, "batch groups queries heads dim"]:
    """One softmax over the shared prompt's keys and the keys of the query's own group.

    Cost: groups x queries x (prompt + length), never (groups x queries) squared.
    """
    (prompt_k, prompt_v), (branch_k, branch_v) = prompt_kv, branch_kv
    grouped = _grouped(q, prompt_k.shape[2]) * (q.shape[-1] ** -0.5)
    on_prompt = jnp.einsum("bnqgrd,bkgd->bngrqk", grouped, prompt_k, preferred_element_type=jnp.float32)
    on_branch = jnp.einsum("bnqgrd,bnkgd->bngrqk", grouped, branch_k, preferred_element_type=jnp.float32)
    on_prompt = jnp.where(prompt_mask[:, :, None, None], on_prompt, NEGATIVE)
    on_branch = jnp.where(branch_mask[:, :, None, None], on_branch, NEGATIVE)
    peak = jnp.maximum(on_prompt.max(axis=-1), on_branch.max(axis=-1, initial=NEGATIVE))
    peak = jax.lax.stop_gradient(peak)[..., None]
    on_prompt = jnp.where(prompt_mask[:, :, None, None], jnp.exp(on_prompt - peak), 0.0)
    on_branch = jnp.where(branch_mask[:, :, None, None], jnp.exp(on_branch - peak), 0.0)
    total = on_prompt.sum(axis=-1) + on_branch.sum(axis=-1)
    out = jnp.einsum("bngrqk,bkgd->bnqgrd", on_prompt.astype(prompt_v.dtype), prompt_v)
    out = out + jnp.einsum("bngrqk,bnkgd->bnqgrd", on_branch.astype(branch_v.dtype), branch_v)
    total = jnp.moveaxis(total, -1, 2)[..., None]
    return keep((out / jnp.where(total > 0, total, 1.0).astype(out.dtype)).reshape(q.shape))


def attend_all(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    layout: Layout,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention of all prompt tokens and, behind them, all branch tokens of a batch."""
    size = layout.size
    if layout.backend in KERNELS:
        return _attend_intervals(q, k, v, layout, (layout.first, layout.last), layout.ancestors)
    mask = interval_mask(layout.first, layout.last, size)
    if layout.backend in LIBRARIES:
        out = attend_alone(q[:, :size], k[:, :size], v[:, :size], layout.first[:, :size], LIBRARIES[layout.backend])
    else:
        out = attend(q[:, :size], k[:, :size], v[:, :size], mask[:, :size])
    if q.shape[1] == size:
        return out
    branch_q, branch_mask = (split_groups(x[:, size:], layout.groups) for x in (q, mask))
    tree = attend_tree(branch_q, *_split_keys(k, v, layout), branch_mask, layout.ancestors)
    return jnp.concatenate([out, tree.reshape(q[:, size:].shape)], axis=1)


def attend_targets(
    q: Float[Array, "batch targets heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    layout: Layout,
    target_parent: Int[Array, "batch targets"],
) -> Float[Array, "batch targets heads dim"]:
    """Attention of the tokens at `target_parent` alone; targets come group by group, as many in each."""
    first, last = (jnp.take_along_axis(edge, target_parent, axis=1) for edge in (layout.first, layout.last))
    ancestors = target_ancestors(layout, target_parent)
    if layout.backend in KERNELS:
        return _attend_intervals(q, k, v, layout, (first, last), ancestors)
    grouped, mask = (split_groups(x, layout.groups) for x in (q, interval_mask(first, last, layout.size)))
    return attend_tree(grouped, *_split_keys(k, v, layout), mask, ancestors).reshape(q.shape)


def _attend_intervals(
    q: Array, k: Array, v: Array, layout: Layout, interval: tuple[Array, Array], own_mask: Array
) -> Array:
    """The prompt's keys by the kernel, a branch's own (few) densely, merged; queries without own keys come first."""
    size, groups = layout.size, layout.groups
    out, lse = split_kernel(KERNELS[layout.backend], k.shape[2])(q, k[:, :size], v[:, :size], *interval)
    own = own_mask.shape[1] * own_mask.shape[2]
    if not own or not own_mask.shape[3]:
        return out
    alone = q.shape[1] - own
    _, (branch_k, branch_v) = _split_keys(k, v, layout)
    among = _attend_own(split_groups(q[:, alone:], groups), branch_k, branch_v, own_mask)
    merged = merge(((out[:, alone:], lse[:, alone:]), among))
    return jnp.concatenate([out[:, :alone], merged], axis=1)


def _attend_own(
    q: Float[Array, "batch groups queries heads dim"],
    k: Float[Array, "batch groups length kv_heads dim"],
    v: Float[Array, "batch groups length kv_heads dim"],
    mask: Bool[Array, "batch groups queries length"],
) -> Outputs:
    """Attention among the tokens of each group and the log-sum-exp of its logits, for all groups in a row."""
    grouped = _grouped(q, k.shape[3]) * (q.shape[-1] ** -0.5)
    logits = jnp.einsum("bnqgrd,bnkgd->bnqgrk", grouped, k, preferred_element_type=jnp.float32)
    seen = mask[:, :, :, None, None]
    logits = jnp.where(seen, logits, NEGATIVE)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
    total = weights.sum(axis=-1)
    some = total > 0
    lse = jnp.where(some, peak[..., 0] + jnp.log(jnp.where(some, total, 1.0)), NOTHING)
    out = jnp.einsum("bnqgrk,bnkgd->bnqgrd", weights.astype(v.dtype), v)
    out = out / jnp.where(some, total, 1.0)[..., None].astype(out.dtype)
    rows = (q.shape[0], q.shape[1] * q.shape[2], q.shape[3])
    return out.reshape(*rows, q.shape[4]), lse.reshape(rows)


def split_groups(x: Array, groups: int) -> Array:
    """[batch, groups x n, ...] -> [batch, groups, n, ...]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _split_keys(k: Array, v: Array, layout: Layout) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Keys and values of the prompt, and of each group of branch tokens."""
    size, groups = layout.size, layout.groups
    return (k[:, :size], v[:, :size]), (split_groups(k[:, size:], groups), split_groups(v[:, size:], groups))


def target_ancestors(
    layout: Layout, target_parent: Int[Array, "batch targets"]
) -> Bool[Array, "batch groups per_group length"]:
    """The tokens of a target's own group that the query at its parent sees; none where the parent is in the prompt.

    Targets come group by group, as many in each.
    """
    batch, groups, length, _ = layout.ancestors.shape
    per_group = target_parent.shape[1] // groups
    if length == 0:
        return jnp.zeros((batch, groups, per_group, 0), bool)
    local = split_groups(target_parent, groups) - (layout.size + length * jnp.arange(groups)[:, None])
    own = jnp.take_along_axis(layout.ancestors, jnp.clip(local, 0, length - 1)[..., None], axis=2)
    return own & (local >= 0)[..., None]


def rope_frequencies(head_dim: int, theta: float | Float[Array, "..."]) -> Float[Array, "... half"]:
    """Rotations per position of each pair of channels; `theta` may differ from token to token."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return jnp.asarray(theta, jnp.float32)[..., None] ** -exponent


def rope_tables(
    positions: Int[Array, "batch tokens"], head_dim: int, theta: float | Float[Array, "batch tokens"]
) -> tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]]:
    """Cosines and sines of rotary positions, float32."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(head_dim, theta)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "batch tokens heads dim"], tables: tuple[Array, ...]
) -> Float[Array, "batch tokens heads dim"]:
    """Rotary embedding of the half-split kind (Llama); `tables` begin with cosines and sines [batch, tokens, half]."""
    cos, sin = (table[..., None, :] for table in tables[:2])
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
