"""Attention in which every query sees an interval of the keys, for TPUs: `interval_attention` by JAX's splash kernel.

The kernel takes one number a query, from which its mask is computed on the chip: here first and last key of the
interval in one. Which blocks of keys a block of queries meets is told it row by row, so those of other segments are
skipped. The library differentiates its output but not its log-sum-exp, which `merge` needs: the gradient here calls
its two backward kernels with the log-sum-exp's share in the place where it belongs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from csp_jax.models.blocks import keep
from csp_jax.models.interval_attention import NOTHING, Intervals, Outputs, Plan, find_blocks

BITS = 16  # of a place among the keys; two fill a number
LANES = 128  # blocks are multiples of these


def splash_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    first: Int[Array, "batch queries"],
    last: Int[Array, "batch queries"],
    *,
    interpret: bool = False,
) -> Outputs:
    """Softmax attention of each query over keys `first <= index <= last`, and the log-sum-exp of its logits.

    As `interval_attention`. `interpret` runs the kernel without a TPU. ValueError beyond 65535 keys.
    """
    if k.shape[1] >= 1 << BITS:
        raise ValueError(f"{k.shape[1]} keys: the kernel tells {(1 << BITS) - 1} apart")
    queries, head_dim = q.shape[1], q.shape[3]
    plan = Plan(head_dim**-0.5, block_size(queries), block_size(k.shape[1]), interpret)
    q = _by_head(jnp.asarray(q) * plan.scale, plan.block_queries)
    k, v = _by_head(k, plan.block_keys), _by_head(v, plan.block_keys)
    intervals = find_blocks(first, last, k.shape[2], plan)
    out, lse = _attention(plan, q, k, v, intervals)
    return out.swapaxes(1, 2)[:, :queries], lse.swapaxes(1, 2)[:, :queries]


def block_size(tokens: int) -> int:
    """Of the kernel, for so many queries or keys: few large blocks, but few that are mostly padding."""
    if tokens <= 4 * LANES:
        return -(-tokens // LANES) * LANES
    return 4 * LANES if -tokens % (4 * LANES) < 2 * LANES else 2 * LANES


def _by_head(x: Float[Array, "batch tokens heads dim"], block: int) -> Float[Array, "batch heads padded dim"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


def _within(interval: Array, key: Array) -> Array:
    """The mask, computed on the chip from what `_masks` wrote."""
    first = jax.lax.shift_right_logical(interval, BITS)
    return (first <= key) & (key <= interval & ((1 << BITS) - 1))


def _masks(plan: Plan, row: Intervals) -> tuple[MaskInfo, MaskInfo]:
    """What the kernels that go through keys and those that go through queries are told of a row.

    Where a block is not met, the number of one that is: nothing is fetched for it.
    """
    shape = (row.key_start.shape[0], row.query_start.shape[0])
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    meets = (row.key_start[:, None] <= key) & (key < row.key_stop[:, None])
    near_key = jnp.clip(key, row.key_start[:, None], jnp.maximum(row.key_stop - 1, row.key_start)[:, None])
    near_query = jnp.clip(query, row.query_start, jnp.maximum(row.query_stop - 1, row.query_start))
    # An empty interval must hold no key: first behind last.
    some = row.first <= row.last
    interval = jnp.where(some, (row.first << BITS) | row.last, 1 << BITS)

    def info(near: Array, most: int) -> MaskInfo:
        return MaskInfo(
            data_next=jnp.minimum(near, most - 1)[None],
            mask_next=None,
            block_mask=meets.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=interval,  # type: ignore[arg-type]
        )

    return info(near_key, shape[1]), info(near_query, shape[0])


def _options(plan: Plan) -> dict[str, Any]:
    return {
        "is_mqa": False,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "mask_function": _within,
        "interpret": plan.interpret,
    }


def _forward(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> tuple[Array, Array]:
    def one(row: tuple[Array, Array, Array, Intervals]) -> tuple[Array, Array]:
        q, k, v, interval = row
        kernel = splash.SplashAttentionKernel(
            _masks(plan, interval)[0],
            None,
            None,
            block_sizes=splash.BlockSizes(plan.block_queries, plan.block_keys),
            save_residuals=True,
            residual_checkpoint_name=None,
            **_options(plan),
        )
        out, (lse,) = kernel(q, k, v)
        some = interval.first <= interval.last
        return jnp.where(some[:, None], out, 0), jnp.where(some, lse, NOTHING)

    return jax.lax.map(one, (q, k, v, intervals))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, intervals)


def _attention_forward(plan: Plan, q: Array, k: Array, v: Array, intervals: Intervals) -> tuple[Any, Any]:
    out, lse = map(keep, _forward(plan, q, k, v, intervals))
    return (out, lse), (q, k, v, intervals, out, lse)


def _attention_backward(plan: Plan, saved: tuple, gradients: tuple[Array, Array]) -> tuple:
    q, k, v, intervals, out, lse = saved
    d_out, d_lse = gradients
    d_out = d_out.astype(q.dtype)
    # d logits = weights (d weights - delta), and the log-sum-exp's gradient enters with the weights themselves.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    sizes = {"bq": plan.block_queries, "bkv": plan.block_keys}
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    options = {**_options(plan), **sizes, "q_layout": layout, "k_layout": layout, "v_layout": layout}

    def one(row: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, interval, lse, d_out, delta = row
        by_key, by_query = _masks(plan, interval)  # type: ignore[arg-type]
        arrays = (q, k, v, None, None, lse, d_out, delta)
        dq = splash._splash_attention_bwd_dq(*arrays, mask_info=by_key, **options)
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays, mask_info=by_query, bkv_compute=plan.block_keys, use_fused_bwd_kernel=False, **options
        )
        return dq, dk, dv

    return *jax.lax.map(one, (q, k, v, intervals, lse, d_out, delta)), None


_attention.defvjp(_attention_forward, _attention_backward)
