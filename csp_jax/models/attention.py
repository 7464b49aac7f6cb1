"""Attention over one prompt and its branches.

A row holds a prompt (one or more packed segments) and `groups` trees of branch tokens. A prompt token attends
causally within its segment. A branch token attends to the prompt up to the token that its tree hangs from,
and to its own ancestors. Softmax runs once over both kinds of keys, so nothing has to be merged afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

NEGATIVE = -1e30


@struct.dataclass
class Layout:
    """Who sees whom, derived once a batch from segments and parent pointers.

    `root`: the prompt index from which a branch token's tree hangs. `depth`: its distance from that prompt
    token. `ancestors`: within its group, the tokens that a branch token sees, itself included.
    """

    prompt_mask: Bool[Array, "batch prompt prompt"]
    root: Int[Array, "batch branch"]
    depth: Int[Array, "batch branch"]
    branch_prompt_mask: Bool[Array, "batch groups length prompt"]
    ancestors: Bool[Array, "batch groups length length"]
    groups: int = struct.field(pytree_node=False)


def prompt_visible(
    segment: Int[Array, "batch prompt"], root: Int[Array, "batch queries"]
) -> Bool[Array, "batch queries prompt"]:
    """The prompt keys that a query hanging from prompt index `root` sees: same segment, not later."""
    own = jnp.take_along_axis(segment, root, axis=1)
    index = jnp.arange(segment.shape[1])
    return (segment[:, None, :] == own[:, :, None]) & (index <= root[:, :, None]) & (own[:, :, None] > 0)


def tree_layout(segment: Int[Array, "batch prompt"], parent: Int[Array, "batch branch"], groups: int) -> Layout:
    """Masks, roots and depths from the parent pointers, by pointer doubling in log2(length) rounds."""
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
    return Layout(
        prompt_mask=prompt_visible(segment, everywhere),
        root=root,
        depth=depth,
        branch_prompt_mask=prompt_visible(segment, root).reshape(batch, groups, length, prompt),
        ancestors=ancestors,
        groups=groups,
    )


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
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights.astype(v.dtype), v).reshape(q.shape)


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
    return (out / jnp.where(total > 0, total, 1.0).astype(out.dtype)).reshape(q.shape)


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
