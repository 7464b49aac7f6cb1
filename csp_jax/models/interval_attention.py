"""Attention in which every query sees an interval of the keys, as a GPU kernel (Pallas, Triton).

That is all that a prompt and its flat branches need: a prompt token sees its segment up to itself, a branch token
the segment that it hangs from up to its root, and its own branch up to itself. Logits never leave the chip; blocks
of keys that no query of a block sees are skipped. Forward and backward follow FlashAttention-2
(https://arxiv.org/abs/2307.08691); the log-sum-exp is an output with a gradient, so that attentions over different
keys can be merged (`merge`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from csp_jax.models.blocks import keep

NOTHING = -1e30  # log-sum-exp of a query that sees nothing
Outputs = tuple[Float[Array, "batch queries heads dim"], Float[Array, "batch queries heads"]]


@struct.dataclass
class Intervals:
    """Padded intervals, and for each block the range of blocks that it meets on the other side."""

    first: Int[Array, "batch queries"]
    last: Int[Array, "batch queries"]
    key_start: Int[Array, "batch query_blocks"]
    key_stop: Int[Array, "batch query_blocks"]
    query_start: Int[Array, "batch key_blocks"]
    query_stop: Int[Array, "batch key_blocks"]


@struct.dataclass
class Plan:
    """Static numbers of a call."""

    scale: float = struct.field(pytree_node=False)
    block_queries: int = struct.field(pytree_node=False)
    block_keys: int = struct.field(pytree_node=False)
    interpret: bool = struct.field(pytree_node=False)


def interval_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    first: Int[Array, "batch queries"],
    last: Int[Array, "batch queries"],
    *,
    block_queries: int = 64,
    block_keys: int = 64,
    interpret: bool = False,
) -> Outputs:
    """Softmax attention of each query over keys `first <= index <= last`, and the log-sum-exp of its logits.

    Softmax and sums in float32. A query with an empty interval gives zeros and a log-sum-exp of `NOTHING`.
    `interpret` runs the kernel without a GPU.
    """
    queries, head_dim = q.shape[1], q.shape[3]
    plan = Plan(head_dim**-0.5, block_queries, block_keys, interpret)
    width = pl.next_power_of_2(max(head_dim, 16))  # of a tile of the tensor cores
    q = _pad(q, block_queries, width)
    k, v = _pad(k, block_keys, width), _pad(v, block_keys, width)
    intervals = find_blocks(first, last, k.shape[1], plan)
    out, lse = _attention(plan, q, k, v, intervals)
    return out[:, :queries, :, :head_dim], lse[:, :queries]


def merge(parts: tuple[Outputs, ...]) -> Float[Array, "batch queries heads dim"]:
    """Attention over the keys of all parts, from attention over those of each."""
    lse = jnp.stack([part[1] for part in parts])
    weights = jnp.exp(lse - jax.lax.stop_gradient(lse.max(axis=0)))
    total = weights.sum(axis=0)
    shares = jnp.where(lse > NOTHING / 2, weights / total, 0.0)[..., None]
    return functools.reduce(jnp.add, (part[0] * share.astype(part[0].dtype) for part, share in zip(parts, shares)))


def find_blocks(
    first: Int[Array, "batch queries"], last: Int[Array, "batch queries"], keys: int, plan: Plan
) -> Intervals:
    """The ranges of blocks that the kernels walk through; queries are padded with empty intervals."""
    missing = -first.shape[1] % plan.block_queries
    first = jnp.pad(first.astype(jnp.int32), ((0, 0), (0, missing)), constant_values=1)
    last = jnp.pad(last.astype(jnp.int32), ((0, 0), (0, missing)), constant_values=0)
    some = (first <= last).reshape(first.shape[0], -1, plan.block_queries)
    lowest = jnp.where(some, first.reshape(some.shape), keys).min(axis=-1)
    highest = jnp.where(some, last.reshape(some.shape), -1).max(axis=-1)
    key_start, key_stop = lowest // plan.block_keys, (highest + plan.block_keys) // plan.block_keys
    block = jnp.arange(keys // plan.block_keys)
    meets = (key_start[..., None] <= block) & (block < key_stop[..., None])  # batch, query blocks, key blocks
    any_query = meets.any(axis=1)
    query_start = jnp.where(any_query, meets.argmax(axis=1), 0)
    query_stop = jnp.where(any_query, meets.shape[1] - meets[:, ::-1].argmax(axis=1), 0)
    return Intervals(first, last, key_start, key_stop, query_start.astype(jnp.int32), query_stop.astype(jnp.int32))


def _pad(x: Array, block: int, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - x.shape[3])))


def _visible(intervals: tuple[Array, Array], keys: Array) -> Array:
    first, last = intervals
    return (first[:, None] <= keys[None, :]) & (keys[None, :] <= last[:, None])


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    last_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    plan: Plan,
) -> None:
    """One block of queries of one head against all blocks of keys that it meets."""
    q, interval = q_ref[...], (first_ref[...], last_ref[...])

    def add_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        at = pl.ds(number * plan.block_keys, plan.block_keys)
        seen = _visible(interval, number * plan.block_keys + jnp.arange(plan.block_keys))
        logits = jnp.where(seen, plgpu.dot(q, k_ref[at, :].T) * plan.scale, NOTHING)
        higher = jnp.maximum(peak, logits.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
        shrink = jnp.exp(peak - higher)
        values = v_ref[at, :]
        added = plgpu.dot(weights.astype(values.dtype), values)
        return out * shrink[:, None] + added, higher, total * shrink + weights.sum(axis=-1)

    zero = jnp.zeros(q.shape[0], jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), zero + NOTHING, zero)
    out, peak, total = jax.lax.fori_loop(start_ref[...], stop_ref[...], add_block, start)
    positive = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (out / positive[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, peak + jnp.log(positive), NOTHING)


def _weights(q: Array, k: Array, lse: Array, seen: Array, scale: float) -> Array:
    """Attention weights of a block again, from the log-sum-exp."""
    return jnp.where(seen, jnp.exp(plgpu.dot(q, k.T) * scale - lse[:, None]), 0.0)


@struct.dataclass
class Given:
    """What both backward kernels read: arrays, the blocks that they come in, or references to one."""

    q: Any
    k: Any
    v: Any
    first: Any
    last: Any
    start: Any
    stop: Any
    lse: Any
    delta: Any
    d_out: Any


def _queries_kernel(given: Given, dq_ref: Any, *, plan: Plan) -> None:
    """The gradient of one block of queries of one head."""
    q, d_out, lse, delta = given.q[...], given.d_out[...], given.lse[...], given.delta[...]
    interval = (given.first[...], given.last[...])

    def add_block(number: Array, dq: Array) -> Array:
        at = pl.ds(number * plan.block_keys, plan.block_keys)
        seen = _visible(interval, number * plan.block_keys + jnp.arange(plan.block_keys))
        k = given.k[at, :]
        weights = _weights(q, k, lse, seen, plan.scale)
        d_logits = weights * (plgpu.dot(d_out, given.v[at, :].T) - delta[:, None]) * plan.scale
        return dq + plgpu.dot(d_logits.astype(k.dtype), k)

    dq = jax.lax.fori_loop(given.start[...], given.stop[...], add_block, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _keys_kernel(given: Given, dk_ref: Any, dv_ref: Any, *, plan: Plan) -> None:
    """The gradients of one block of keys and values of one head, over all query heads that share it."""
    k, v = given.k[...], given.v[...]
    keys = pl.program_id(0) * plan.block_keys + jnp.arange(plan.block_keys)

    def add_block(number: Array, carry: tuple[Array, Array], head: int) -> tuple[Array, Array]:
        dk, dv = carry
        at = pl.ds(number * plan.block_queries, plan.block_queries)
        seen = _visible((given.first[at], given.last[at]), keys)
        q, d_out = given.q[at, head, :], given.d_out[at, head, :]
        weights = _weights(q, k, given.lse[at, head], seen, plan.scale)
        dv = dv + plgpu.dot(weights.astype(d_out.dtype).T, d_out)
        d_logits = weights * (plgpu.dot(d_out, v.T) - given.delta[at, head][:, None]) * plan.scale
        return dk + plgpu.dot(d_logits.astype(q.dtype).T, q), dv

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for head in range(given.q.shape[1]):
        carry = jax.lax.fori_loop(given.start[...], given.stop[...], functools.partial(add_block, head=head), carry)
    dk_ref[...], dv_ref[...] = carry[0].astype(dk_ref.dtype), carry[1].astype(dv_ref.dtype)


def _per_query(plan: Plan, repeat: int, keys: int, width: int) -> tuple[list[pl.BlockSpec], pl.BlockSpec, pl.BlockSpec]:
    """Blocks of the grid (query block, batch, head): of the inputs that both such kernels have, of an array like the
    queries, of one number a query.
    """
    like_queries = pl.BlockSpec((None, plan.block_queries, None, width), lambda i, b, h: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, keys, None, width), lambda i, b, h: (b, 0, h // repeat, 0))
    interval = pl.BlockSpec((None, plan.block_queries), lambda i, b, h: (b, i))
    bound = pl.BlockSpec((None, None), lambda i, b, h: (b, i))
    number = pl.BlockSpec((None, plan.block_queries, None), lambda i, b, h: (b, i, h))
    return [like_queries, all_keys, all_keys, interval, interval, bound, bound], like_queries, number


def _warps(width: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2)


def _forward(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> Outputs:
    batch, queries, heads, width = q.shape
    inputs, like_queries, number = _per_query(plan, heads // k.shape[2], k.shape[1], width)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan),
        grid=(queries // plan.block_queries, batch, heads),
        in_specs=inputs,
        out_specs=[like_queries, number],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
        ],
        compiler_params=_warps(width),
        interpret=plan.interpret,
        name="interval_attention",
    )(q, k, v, intervals.first, intervals.last, intervals.key_start, intervals.key_stop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> Outputs:
    return _forward(plan, q, k, v, intervals)


def _attention_forward(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> tuple[Outputs, tuple]:
    out, lse = map(keep, _forward(plan, q, k, v, intervals))
    return (out, lse), (q, k, v, intervals, out, lse)


def _attention_backward(plan: Plan, saved: tuple, gradients: Outputs) -> tuple:
    q, k, v, intervals, out, lse = saved
    d_out, d_lse = gradients
    d_out = d_out.astype(q.dtype)
    # d logits = weights (d weights - delta), and the log-sum-exp's gradient enters with the weights themselves.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    bounds = (intervals.first, intervals.last)
    by_query = Given(q, k, v, *bounds, intervals.key_start, intervals.key_stop, lse, delta, d_out)
    split = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2])  # heads by the keys that they share
    q, d_out = (x.reshape(*split, x.shape[3]) for x in (q, d_out))
    lse, delta = lse.reshape(split), delta.reshape(split)
    by_key = Given(q, k, v, *bounds, intervals.query_start, intervals.query_stop, lse, delta, d_out)
    return _gradient_of_queries(plan, by_query), *_gradient_of_keys(plan, by_key), None


def _gradient_of_queries(plan: Plan, given: Given) -> Array:
    batch, queries, heads, width = given.q.shape
    inputs, like_queries, number = _per_query(plan, heads // given.k.shape[2], given.k.shape[1], width)
    return pl.pallas_call(
        functools.partial(_queries_kernel, plan=plan),
        grid=(queries // plan.block_queries, batch, heads),
        in_specs=[Given(*[*inputs, number, number, like_queries])],
        out_specs=like_queries,
        out_shape=jax.ShapeDtypeStruct(given.q.shape, given.q.dtype),
        compiler_params=_warps(width),
        interpret=plan.interpret,
        name="interval_attention_dq",
    )(given)


def _gradient_of_keys(plan: Plan, given: Given) -> tuple[Array, Array]:
    batch, queries, kv_heads, repeat, width = given.q.shape
    like_keys = pl.BlockSpec((None, plan.block_keys, None, width), lambda j, b, h: (b, j, h, 0))
    all_queries = pl.BlockSpec((None, queries, None, repeat, width), lambda j, b, h: (b, 0, h, 0, 0))
    all_numbers = pl.BlockSpec((None, queries, None, repeat), lambda j, b, h: (b, 0, h, 0))
    interval = pl.BlockSpec((None, queries), lambda j, b, h: (b, 0))
    bound = pl.BlockSpec((None, None), lambda j, b, h: (b, j))
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (given.k, given.v)]
    return pl.pallas_call(
        functools.partial(_keys_kernel, plan=plan),
        grid=(given.k.shape[1] // plan.block_keys, batch, kv_heads),
        in_specs=[
            Given(
                q=all_queries,
                k=like_keys,
                v=like_keys,
                first=interval,
                last=interval,
                start=bound,
                stop=bound,
                lse=all_numbers,
                delta=all_numbers,
                d_out=all_queries,
            )
        ],
        out_specs=[like_keys, like_keys],
        out_shape=like,
        compiler_params=_warps(width),
        interpret=plan.interpret,
        name="interval_attention_dkv",
    )(given)


_attention.defvjp(_attention_forward, _attention_backward)
