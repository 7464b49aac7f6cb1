"""LoRA: low-rank adapters around linear layers of any model; the models themselves do not know of them.

A wrapped layer computes `base(x) + scale * (dropout(x) A) B`; the kernel is read, never rewritten. The names of the
base's parameters stay what they were, so that checkpoints, freezing and sharding work as without an adapter.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from csp_jax.errors import UserError
from csp_jax.models.blocks import Linear
from csp_jax.models.checkpoint_map import TRANSPOSE
from csp_jax.models.hub import path_pattern
from csp_jax.models.interface import VisionLanguageModel

Model = TypeVar("Model", bound=VisionLanguageModel)
DROPOUT_STREAM = 0x6C6F7261  # keeps the dropout's randomness apart from the noise of pictures


class LoraParam(nnx.Param):
    """A parameter of an adapter. Where a model has any, nothing else trains."""


class LoraLinear(Linear):
    """A linear layer (or a stack of them) with an adapter: `lora_a` [..., in, rank] and `lora_b` [..., rank, out].

    Dropout acts on the adapter's input, and only after `start_dropout` has given it a key.
    """

    def __init__(self, base: Linear, a: Array, b: Array, *, scale: float, dropout: float = 0.0):
        self.kernel, self.bias = base.kernel, base.bias
        into, out = base.kernel.get_metadata()["axes"]
        self.lora_a = LoraParam(a, axes=(into, "rank"))
        self.lora_b = LoraParam(b, axes=("rank", out))
        self.scale, self.dropout, self.enabled = scale, dropout, True
        self.dropout_key: nnx.Variable | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... in_features"]) -> Float[Array, "... out_features"]:
        y = super().__call__(x)
        if not self.enabled:
            return y
        if self.dropout and self.dropout_key is not None:
            kept = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return y + (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.scale


def adapted(model: nnx.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every layer that has an adapter, under its dotted path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoraLinear):
            yield ".".join(map(str, path)), module


def has_adapter(state: nnx.State) -> bool:
    """Whether a state holds parameters of an adapter."""
    return any(isinstance(variable, LoraParam) for _, variable in nnx.to_flat_state(state))


def linear_layers(model: VisionLanguageModel) -> dict[str, Linear]:
    """The layers that can have an adapter, by path: linear modules of the original, the vocabulary head left out."""
    tensors = type(model).tensors(model.config)
    linear = {tensor.path for tensor in tensors if tensor.transform is TRANSPOSE and tensor.keys[0].endswith(".weight")}
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {
        path: module
        for path, module in found.items()
        if isinstance(module, Linear) and f"{path}.kernel" in linear and path != "decoder.head"
    }


def put_adapter(
    model: VisionLanguageModel, path: str, a: Array, b: Array, *, scale: float, dropout: float = 0.0
) -> None:
    """Wrap the linear layer at a path."""
    _replace(model, path, lambda base: LoraLinear(base, a, b, scale=scale, dropout=dropout))


def _replace(model: nnx.Module, path: str, made_of: Callable[[Any], Linear]) -> None:
    """Put in place of the layer at a path what is made of it."""
    *parents, name = path.split(".")
    parent: Any = functools.reduce(getattr, parents, model)
    setattr(parent, name, made_of(getattr(parent, name)))


def add_adapter(
    model: VisionLanguageModel,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> None:
    """Wrap the linear layers whose paths match one of `targets` (regular expressions, from the path's beginning).

    As PEFT does it: A uniform in +-1 / sqrt(in), B zero, so that the model computes at first what it did before.
    UserError: a pattern that is no regular expression or matches no linear layer, or a model that is wrapped already.
    """
    if any(adapted(model)):
        raise UserError("the model has an adapter already", field="model.lora", mend="Merge it first")
    layers = linear_layers(model)
    used = [path for path in layers if not any(path.startswith(prefix) for prefix in type(model).unused)]
    mend = "Patterns are matched from the beginning of the names of linear layers such as decoder.layers.mlp.up"
    patterns = [path_pattern(text, used, field="model.lora.targets", mend=mend) for text in targets]
    for path in filter(lambda path: any(pattern.match(path) for pattern in patterns), used):
        *lead, into, out = layers[path].kernel.shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        bound = into**-0.5
        a = jax.random.uniform(key, (*lead, into, rank), jnp.float32, -bound, bound).astype(dtype)
        put_adapter(model, path, a, jnp.zeros((*lead, rank, out), dtype), scale=alpha / rank, dropout=dropout)


def start_dropout(model: nnx.Module, key: Array) -> None:
    """Give every adapter of a model its own key; from here on the model drops out. For use inside a step."""
    for path, module in adapted(model):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        lead = module.lora_a.shape[:-2]
        module.dropout_key = nnx.Variable(jax.random.split(own, lead) if lead else own)


def dropout_key(seed: int, step: Array) -> Array:
    """The key of a step's dropout; micro-batches fold in their number."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), DROPOUT_STREAM), step)


def _again(model: Model) -> Model:
    """Another model object over the same variables."""
    return nnx.merge(*nnx.split(model))


def adapter_off(model: Model) -> Model:
    """The model without its adapter, over the same variables: it computes what the base computes, bit for bit."""
    base = _again(model)
    for _, module in adapted(base):
        module.enabled = False
    return base


def merge_adapter(model: Model) -> Model:
    """The model with its adapter added into the kernels (in float32, kept in their precision), for export."""
    merged = _again(model)
    for path, _ in list(adapted(merged)):
        _replace(merged, path, _merged)
    return merged


def _merged(module: LoraLinear) -> Linear:
    delta = jnp.matmul(
        module.lora_a[...].astype(jnp.float32), module.lora_b[...].astype(jnp.float32), precision="highest"
    )
    before = module.kernel[...]
    sum_of_both = (before.astype(jnp.float32) + module.scale * delta).astype(before.dtype)
    plain = Linear(1, 1, bias=module.bias is not None, rngs=nnx.Rngs(0))
    kernel: Any = module.kernel.replace(sum_of_both)
    plain.kernel, plain.bias = kernel, module.bias
    return plain
