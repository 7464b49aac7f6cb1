"""The Llama-shaped decoder over one prompt and its branches.

All layers but the last are scanned. The last stands apart: only the hidden states from which a target is read
are computed there, so the prompt costs it no more than its keys and values.

What is said token by token remembers keys and values: `prefill` is the whole pass that keeps them, `extend` feeds
one more token to every continuation of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from csp_jax.models.attention import Layout, attend_all, attend_targets, attend_tree, rotate
from csp_jax.models.blocks import Embedding, GatedMlp, Linear, RMSNorm, keep, scan_layers, stack_layers
from csp_jax.models.checkpoint_map import SAME, Tensor, linear

Tables = tuple[Array, ...]  # rotary cosines and sines; as a third, where the family has it, the queries' scale
KeysValues = tuple[Array, Array]  # of all layers: [layers, batch, ..., kv_heads, dim], the last layer last
INIT_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-shaped decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool = False
    tie_word_embeddings: bool = False


def init_scales(config: DecoderConfig) -> tuple[float, float]:
    """Standard deviations of random weights: small, and smaller still where a layer adds to the residual stream.

    Word embeddings start at 0.02, so a layer that adds more than that drowns which word a position holds.
    """
    return INIT_SCALE, INIT_SCALE * (2 * config.num_layers) ** -0.5


class Attention(nnx.Module):
    """Projections of grouped-query attention."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim

        inwards, outwards = init_scales(config)

        def project(heads: int) -> Linear:
            return Linear(
                width,
                heads * head_dim,
                bias=config.attention_bias,
                axes=("embed", "heads"),
                scale=inwards,
                dtype=dtype,
                rngs=rngs,
            )

        self.query = project(config.num_heads)
        self.key = project(config.num_kv_heads)
        self.value = project(config.num_kv_heads)
        self.out = Linear(
            config.num_heads * head_dim, width, axes=("heads", "embed"), scale=outwards, dtype=dtype, rngs=rngs
        )
        self.head_dim = head_dim

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def queries(self, x: Float[Array, "batch tokens width"], tables: Tables) -> Array:
        """Rotated queries [batch, tokens, heads, dim]."""
        q = rotate(self._heads(self.query(x)), tables)
        return keep(q * tables[2][..., None, :].astype(q.dtype) if len(tables) > 2 else q)

    def keys_values(self, x: Float[Array, "batch tokens width"], tables: Tables) -> tuple[Array, Array]:
        """Rotated keys and values [batch, tokens, kv_heads, dim]."""
        return keep(rotate(self._heads(self.key(x)), tables)), keep(self._heads(self.value(x)))

    def project(self, x: Float[Array, "batch tokens heads dim"]) -> Float[Array, "batch tokens width"]:
        return keep(self.out(x.reshape(*x.shape[:-2], -1)))


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(width, epsilon=eps, dtype=dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(width, epsilon=eps, dtype=dtype)
        self.mlp = GatedMlp(width, config.intermediate_size, scales=init_scales(config), dtype=dtype, rngs=rngs)

    def feed_forward(self, x: Array) -> Array:
        return x + self.mlp(self.mlp_norm(x))


def _concat_tables(tables: tuple[Tables, Tables]) -> Tables:
    return tuple(jnp.concatenate([prompt, branch], 1) for prompt, branch in zip(*tables, strict=True))


def _put(memory: KeysValues, new: tuple[Array, Array], start: tuple[Array | int, ...]) -> KeysValues:
    """A memory with one layer's new keys and values written from `start` on (zeros where it ends)."""

    def put(all: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(all, new[None], (*start, *[0] * (all.ndim - len(start))))

    return put(memory[0], new[0]), put(memory[1], new[1])


class Decoder(nnx.Module):
    """Embeddings, layers, final norm and vocabulary head."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = (
            stack_layers(lambda keys: Layer(config, dtype, keys), config.num_layers - 1, rngs)
            if config.num_layers > 1
            else None
        )
        if self.layers is not None:
            self._match_words_to_slots(self.layers)
        self.last = Layer(config, dtype, rngs)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, axes=("embed", "vocab"), scale=INIT_SCALE, dtype=dtype, rngs=rngs
            )
        )

    def _match_words_to_slots(self, layers: Layer) -> None:
        """Random start: the first layer's queries look for tokens like their own.

        So words find the picture slots that bear their name from the first step on; a checkpoint overwrites it.
        """
        attention, width = layers.attention, self.config.hidden_size
        if self.config.num_heads * self.config.head_dim == self.config.num_kv_heads * self.config.head_dim == width:
            for projection in (attention.query, attention.key):
                kernel = projection.kernel[...]
                projection.kernel[...] = kernel.at[0].add(jnp.eye(width, dtype=kernel.dtype))

    def head_kernel(self) -> Float[Array, "width vocab"]:
        """The vocabulary projection (the embedding's transpose when tied)."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def __call__(
        self,
        prompt: Float[Array, "batch prompt width"],
        branch: Float[Array, "batch branch width"],
        layout: Layout,
        tables: tuple[Tables, Tables],
        target_parent: Int[Array, "batch targets"],
        remat: Callable | None = None,
    ) -> Float[Array, "batch targets width"]:
        """Normed hidden states at the parents of the targets (indices into prompt then branch).

        `tables`: rotary cosines and sines of the prompt and of the branch tokens.
        """
        hidden = jnp.concatenate([prompt, branch], axis=1)
        joint = _concat_tables(tables)

        def call(layer: Layer, hidden: Array) -> Array:
            return self._layer(layer, hidden, layout, joint)[0]

        if self.layers is not None:
            hidden = scan_layers(self.layers, hidden, call, remat)
        return self.norm(self._last(hidden, layout, joint, target_parent)[0])

    def prefill(
        self,
        prompt: Float[Array, "batch prompt width"],
        branch: Float[Array, "batch branch width"],
        layout: Layout,
        tables: tuple[Tables, Tables],
        target_parent: Int[Array, "batch targets"],
    ) -> tuple[Float[Array, "batch targets width"], KeysValues, KeysValues]:
        """As `__call__`; and the keys and values of the prompt, and those of the branch tokens.

        They are [layers, batch, prompt, kv_heads, dim] and [layers, batch, groups, length, kv_heads, dim].
        """
        hidden, joint = jnp.concatenate([prompt, branch], axis=1), _concat_tables(tables)
        config, size = self.config, prompt.shape[1]
        shape = (config.num_layers, *hidden.shape[:2], config.num_kv_heads, config.head_dim)
        memory = (jnp.zeros(shape, hidden.dtype), jnp.zeros(shape, hidden.dtype))

        def call(layer: Layer, carry: tuple[Array, KeysValues, Array]) -> tuple[Array, KeysValues, Array]:
            hidden, memory, number = carry
            hidden, new = self._layer(layer, hidden, layout, joint)
            return hidden, _put(memory, new, (number,)), number + 1

        carry = (hidden, memory, jnp.zeros((), jnp.int32))
        if self.layers is not None:
            carry = scan_layers(self.layers, carry, call)
        hidden, memory, number = carry
        read, new = self._last(hidden, layout, joint, target_parent)
        memory = _put(memory, new, (number,))
        groups, length = layout.groups, branch.shape[1] // layout.groups
        k, v = memory
        split = (*k.shape[:2], groups, length, *k.shape[3:])
        return (
            self.norm(read),
            (k[:, :, :size], v[:, :, :size]),
            (k[:, :, size:].reshape(split), v[:, :, size:].reshape(split)),
        )

    def extend(
        self,
        tokens: Float[Array, "batch groups tokens width"],
        tables: Tables,
        prompt: KeysValues,
        own: KeysValues,
        masks: tuple[Bool[Array, "*#some prompt"], Bool[Array, "*#some length"]],
        place: Int[Array, ""],
    ) -> tuple[Float[Array, "batch groups tokens width"], KeysValues]:
        """Normed hidden states of one more token of every continuation, `tokens` of them in a group, and their keys and
        values from `place` on of `own`.

        `prompt` and `own` are what `prefill` gave, with room; `masks` say which keys of either each of the tokens sees;
        `tables` are those of the tokens [batch, 1 or groups x tokens, half].
        """
        shape = tokens.shape[:3]

        def apart(x: Array) -> Array:
            return x.reshape(*shape, *x.shape[2:])

        def call(layer: Layer, carry: tuple[Array, KeysValues, Array]) -> tuple[Array, KeysValues, Array]:
            hidden, own, number = carry
            normed = layer.attention_norm(hidden)
            q = layer.attention.queries(normed, tables)
            k, v = layer.attention.keys_values(normed, tables)
            own = _put(own, (apart(k), apart(v)), (number, 0, 0, place))
            of_prompt, of_own = ((k[number], v[number]) for k, v in (prompt, own))
            out = attend_tree(apart(q), of_prompt, of_own, *masks).reshape(q.shape)
            return layer.feed_forward(hidden + layer.attention.project(out)), own, number + 1

        carry = (tokens.reshape(shape[0], -1, tokens.shape[-1]), own, jnp.zeros((), jnp.int32))
        if self.layers is not None:
            carry = scan_layers(self.layers, carry, call)
        hidden, own, _ = call(self.last, carry)
        return apart(self.norm(hidden)), own

    def _layer(self, layer: Layer, hidden: Array, layout: Layout, tables: Tables) -> tuple[Array, tuple[Array, Array]]:
        """Hidden states behind a layer, and its keys and values."""
        normed = layer.attention_norm(hidden)
        q = layer.attention.queries(normed, tables)
        k, v = layer.attention.keys_values(normed, tables)
        out = attend_all(q, k, v, layout)
        return layer.feed_forward(hidden + layer.attention.project(out)), (k, v)

    def _last(
        self, hidden: Array, layout: Layout, tables: Tables, target_parent: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """Hidden states of the targets' parents behind the last layer, and its keys and values."""
        layer = self.last
        normed = layer.attention_norm(hidden)
        k, v = layer.attention.keys_values(normed, tables)
        at = target_parent[..., None]
        query_tables = tuple(jnp.take_along_axis(table, at, 1) for table in tables)
        q = layer.attention.queries(jnp.take_along_axis(normed, at, 1), query_tables)
        out = attend_targets(q, k, v, layout, target_parent)
        residual = jnp.take_along_axis(hidden, at, 1)
        return layer.feed_forward(residual + layer.attention.project(out)), (k, v)


def cast_floating(tree: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Every floating leaf in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


LLAMA_LAYER = [
    Tensor("attention_norm.scale", ("input_layernorm.weight",), SAME),
    *linear("attention.query", "self_attn.q_proj", bias=False),
    *linear("attention.key", "self_attn.k_proj", bias=False),
    *linear("attention.value", "self_attn.v_proj", bias=False),
    *linear("attention.out", "self_attn.o_proj", bias=False),
    Tensor("mlp_norm.scale", ("post_attention_layernorm.weight",), SAME),
    *linear("mlp.gate", "mlp.gate_proj", bias=False),
    *linear("mlp.up", "mlp.up_proj", bias=False),
    *linear("mlp.down", "mlp.down_proj", bias=False),
]
QKV_BIAS = [  # where a Llama-shaped decoder has them
    Tensor(f"attention.{ours}.bias", (f"self_attn.{theirs}_proj.bias",), SAME)
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
]
