"""Vision transformers: the layer that all towers share, and CLIP, run only as far as its features are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from csp_jax.models.attention import Span, attend, attend_span, rotate, whole_span
from csp_jax.models.blocks import LayerNorm, Linear, Mlp, RMSNorm, keep, scan_layers, stack_layers
from csp_jax.models.checkpoint_map import CONV, SAME, Tensor, layer_tensors, linear, norm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionLayerConfig:
    """Sizes and variants of a pre-norm transformer layer over patches."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    activation: str
    norm_eps: float
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    attention_bias: bool = True  # of query, key and value
    query_key_norm: bool = False
    layer_scale: bool = False


def vision_norm(config: VisionLayerConfig, dtype: jnp.dtype) -> LayerNorm | RMSNorm:
    """The norm of a tower's width."""
    kind = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return kind(config.hidden_size, epsilon=config.norm_eps, dtype=dtype)


class VisionAttention(nnx.Module):
    """Attention among the patches of an image, in both directions."""

    def __init__(self, config: VisionLayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size

        def project() -> Linear:
            return Linear(width, width, bias=config.attention_bias, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        self.out = Linear(width, width, bias=True, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.query_norm = vision_norm(config, dtype) if config.query_key_norm else None
        self.key_norm = vision_norm(config, dtype) if config.query_key_norm else None
        self.heads = config.num_heads

    def __call__(
        self,
        x: Float[Array, "images tokens width"],
        mask: Bool[Array, "images tokens tokens"] | Span | None,
        tables: tuple[Array, ...] | None,
    ) -> Float[Array, "images tokens width"]:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.reshape(split) for part in (q, k, v))
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        q, k, v = (keep(part) for part in (q, k, v))
        seen = attend_span(q, k, v, mask) if isinstance(mask, Span) else attend(q, k, v, mask)
        return keep(self.out(seen.reshape(x.shape)))


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a scale per channel where the family has it."""

    def __init__(self, config: VisionLayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.attention_norm = vision_norm(config, dtype)
        self.attention = VisionAttention(config, dtype, rngs)
        self.mlp_norm = vision_norm(config, dtype)
        self.mlp = Mlp(width, config.intermediate_size, width, activation=config.activation, dtype=dtype, rngs=rngs)

        def scale() -> nnx.Param | None:
            return nnx.Param(jnp.full((width,), 0.1, dtype), axes=("norm",)) if config.layer_scale else None

        self.attention_scale, self.mlp_scale = scale(), scale()

    def __call__(
        self,
        x: Float[Array, "images tokens width"],
        mask: Bool[Array, "images tokens tokens"] | Span | None = None,
        tables: tuple[Array, ...] | None = None,
    ) -> Float[Array, "images tokens width"]:
        """`mask`: which patches see each other (None: all); `tables`: rotary cosines and sines."""
        x = x + _scaled(self.attention(self.attention_norm(x), mask, tables), self.attention_scale)
        return x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)


def _scaled(x: Array, scale: nnx.Param | None) -> Array:
    return x if scale is None else x * scale[...].astype(x.dtype)


def patchify(pixels: Float[Array, "images height width 3"], size: int) -> Float[Array, "images patches values"]:
    """Non-overlapping patches in row-major order, each flattened as (row, column, channel)."""
    images, height, width, channels = pixels.shape
    grid = pixels.reshape(images, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(images, -1, size * size * channels)


def merge_squares(features: Float[Array, "images patches width"]) -> Float[Array, "images merged four_widths"]:
    """Each 2 x 2 square of a square grid of patches as one feature: rows, then columns, then channels."""
    images, patches, width = features.shape
    side = round(patches**0.5)
    grid = features.reshape(images, side // 2, 2, side // 2, 2, width)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(images, patches // 4, 4 * width)


def standardize(
    canvas: Float[Array, "... 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "... 3"]:
    """Canvas in [-1, 1] -> pixel values with the given mean and standard deviation of [0, 1] colours taken out."""
    return ((canvas + 1) / 2 - jnp.asarray(mean, canvas.dtype)) / jnp.asarray(std, canvas.dtype)


def each_cell(
    encode: Callable[[Float[Array, "cells height width 3"]], Float[Array, "cells features width"]],
    pixels: Float[Array, "batch cells height width 3"],
) -> Float[Array, "batch features width"]:
    """Features of every cell, encoded apart; those of a row's cells stand one after another."""
    batch, count = pixels.shape[:2]
    features = encode(pixels.reshape(-1, *pixels.shape[2:]))
    return features.reshape(batch, count * features.shape[1], -1)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP tower; `feature_layer` counts hidden states like transformers (-2: skip the last)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str
    layer_norm_eps: float
    feature_layer: int

    @property
    def used_layers(self) -> int:
        """Layers that the chosen hidden state needs."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def layer(self) -> VisionLayerConfig:
        return VisionLayerConfig(
            self.hidden_size, self.intermediate_size, self.num_heads, self.activation, self.layer_norm_eps
        )


def _positions(config: ClipConfig) -> Float[Array, "positions width"]:
    """Sines and cosines of column and row: where an untrained tower starts. The class token has no place."""
    side, width = config.image_size // config.patch_size, config.hidden_size
    angle = jnp.arange(side)[:, None] * jnp.pi / side * jnp.geomspace(0.5, side / 2, width // 4)
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    places = jnp.concatenate([jnp.tile(waves, (side, 1)), jnp.repeat(waves, side, axis=0)], axis=-1)
    return jnp.pad(0.5 * places, ((1, 0), (0, width - places.shape[1])))


class ClipVision(nnx.Module):
    """Patch embedding, class token, positions, layers; those past the feature layer are carried, not run."""

    def __init__(self, config: ClipConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, layer = config.hidden_size, config.layer
        self.config = config
        self.patch = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((width,), dtype), axes=("norm",))
        self.position = nnx.Param(_positions(config).astype(dtype), axes=("position", "embed"))
        self.pre_norm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)
        self.layers = stack_layers(lambda keys: VisionLayer(layer, dtype, keys), config.used_layers, rngs)
        unused = config.num_layers - config.used_layers
        self.unused_layers = (
            stack_layers(lambda keys: VisionLayer(layer, dtype, keys), unused, rngs) if unused else None
        )
        self.unused_norm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)

    def __call__(
        self, pixels: Float[Array, "images height width 3"], remat: Callable | None = None, attention: str = "xla"
    ) -> Float[Array, "images patches width"]:
        """Patch features of the chosen hidden state, class token dropped."""
        x = self.patch(patchify(pixels, self.config.patch_size))
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype)
        span = whole_span(x, attention)
        x = scan_layers(self.layers, self.pre_norm(x), lambda layer, x: layer(x, span), remat)
        return x[:, 1:]


CLIP_LAYER = [
    *norm("attention_norm", "layer_norm1"),
    *linear("attention.query", "self_attn.q_proj"),
    *linear("attention.key", "self_attn.k_proj"),
    *linear("attention.value", "self_attn.v_proj"),
    *linear("attention.out", "self_attn.out_proj"),
    *norm("mlp_norm", "layer_norm2"),
    *linear("mlp.up", "mlp.fc1"),
    *linear("mlp.down", "mlp.fc2"),
]


def clip_tensors(config: ClipConfig, path: str, tower: str) -> list[Tensor]:
    """The tensors of a CLIP tower whose hub names begin with `tower`."""
    layer, used = f"{tower}.encoder.layers.{{n}}", config.used_layers
    return [
        Tensor(f"{path}.patch.kernel", (f"{tower}.embeddings.patch_embedding.weight",), CONV),
        Tensor(f"{path}.class_token", (f"{tower}.embeddings.class_embedding",), SAME),
        Tensor(f"{path}.position", (f"{tower}.embeddings.position_embedding.weight",), SAME),
        *norm(f"{path}.pre_norm", f"{tower}.pre_layrnorm"),
        *norm(f"{path}.unused_norm", f"{tower}.post_layernorm"),
        *layer_tensors(f"{path}.layers", layer, CLIP_LAYER, range(used)),
        *layer_tensors(f"{path}.unused_layers", layer, CLIP_LAYER, range(used, config.num_layers)),
    ]
