"""The CLIP vision transformer, run only as far as the features that are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from csp_jax.models.attention import attend
from csp_jax.models.blocks import LayerNorm, Linear, Mlp, scan_layers, stack_layers


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


class ClipAttention(nnx.Module):
    """Bidirectional attention with biases."""

    def __init__(self, width: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        def project() -> Linear:
            return Linear(width, width, bias=True, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        self.out = Linear(width, width, bias=True, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "images tokens width"]) -> Float[Array, "images tokens width"]:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        return self.out(attend(q, k, v, None).reshape(x.shape))


class ClipLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ClipConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = LayerNorm(width, epsilon=eps, dtype=dtype)
        self.attention = ClipAttention(width, config.num_heads, dtype, rngs)
        self.mlp_norm = LayerNorm(width, epsilon=eps, dtype=dtype)
        self.mlp = Mlp(width, config.intermediate_size, width, activation=config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "images tokens width"]) -> Float[Array, "images tokens width"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def patchify(pixels: Float[Array, "images height width 3"], size: int) -> Float[Array, "images patches values"]:
    """Non-overlapping patches in row-major order, each flattened as (row, column, channel)."""
    images, height, width, channels = pixels.shape
    grid = pixels.reshape(images, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(images, -1, size * size * channels)


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
        width = config.hidden_size
        self.config = config
        self.patch = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((width,), dtype), axes=("norm",))
        self.position = nnx.Param(_positions(config).astype(dtype), axes=("position", "embed"))
        self.pre_norm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)
        self.layers = stack_layers(lambda keys: ClipLayer(config, dtype, keys), config.used_layers, rngs)
        unused = config.num_layers - config.used_layers
        self.unused_layers = stack_layers(lambda keys: ClipLayer(config, dtype, keys), unused, rngs) if unused else None
        self.unused_norm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)

    def __call__(
        self, pixels: Float[Array, "images height width 3"], remat: Callable | None = None
    ) -> Float[Array, "images patches width"]:
        """Patch features of the chosen hidden state, class token dropped."""
        x = self.patch(patchify(pixels, self.config.patch_size))
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype)
        x = scan_layers(self.layers, self.pre_norm(x), lambda layer, x: layer(x), remat)
        return x[:, 1:]
