"""The small modules of every family. Kernels are stored [in, out]; compute follows the input's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

KEPT = "kept"  # name of what the recomputation policy `save_names` keeps

Stacked = TypeVar("Stacked", bound=nnx.Module)
Carry = TypeVar("Carry")


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> Array:
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * scale).astype(dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`; `axes` are the logical axes of the kernel, read by the sharding rules.

    `scale` is the standard deviation of random weights, 1 / sqrt(in_features) unless given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        axes: tuple[str, str] = ("embed", "mlp"),
        scale: float | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        scale = in_features**-0.5 if scale is None else scale
        self.kernel = nnx.Param(_normal(rngs, (in_features, out_features), scale, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "... in_features"]) -> Float[Array, "... out_features"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of rows."""

    def __init__(self, rows: int, features: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (rows, features), 0.02, dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... features"]:
        return jnp.take(self.embedding[...], tokens, axis=0)


class LayerNorm(nnx.Module):
    """Layer normalization, in float32 whatever the input's dtype."""

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((features,), dtype), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization, in float32 whatever the input's dtype."""

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two layers with an activation between (vision towers, projectors)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        out: int,
        *,
        activation: str,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.up = Linear(features, hidden, bias=True, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, out, bias=True, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMlp(nnx.Module):
    """`down(silu(gate x) * up x)` (decoders); `scales` of random weights: inwards and outwards."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        scales: tuple[float | None, float | None] = (None, None),
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inwards, outwards = scales
        self.gate = Linear(features, hidden, axes=("embed", "mlp"), scale=inwards, dtype=dtype, rngs=rngs)
        self.up = Linear(features, hidden, axes=("embed", "mlp"), scale=inwards, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, features, axes=("mlp", "embed"), scale=outwards, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def keep(x: Array) -> Array:
    """The same, named as dear to compute and small to hold: see `KEPT`."""
    return checkpoint_name(x, KEPT)


def stack_layers(make: Callable[[nnx.Rngs], Stacked], count: int, rngs: nnx.Rngs) -> Stacked:
    """`count` layers of one kind as one module whose variables have a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(
    layers: Stacked,
    carry: Carry,
    call: Callable[[Stacked, Carry], Carry],
    remat: Callable | None = None,
) -> Carry:
    """Run stacked layers one after another: `carry = call(layer, carry)`; `remat` wraps the body."""
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, state: nnx.State) -> tuple[Carry, None]:
        return call(nnx.merge(graphdef, state), carry), None

    return jax.lax.scan(remat(body) if remat else body, carry, state)[0]
