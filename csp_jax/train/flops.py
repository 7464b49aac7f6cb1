"""Useful work of a training step: what the mathematics asks for, nothing that is computed twice or masked away.

Counted on the step itself as JAX traces it, without recomputation of activations: every matrix product of the vision
tower, the projector, the decoder and the head, forward and backward, as often as its loop runs. What is frozen has no
gradient and costs none. Of the prompt's attention, which computes all pairs, the half that causality masks is taken
off.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from csp_jax.config import TrainConfig
from csp_jax.data.batch import Batch
from csp_jax.models.decoder import DecoderConfig
from csp_jax.train.configured import configured_step, make_optimizer
from csp_jax.train.state import TrainState, split_model


def product_flops(jaxpr: Any, loops: float = 1) -> float:
    """Multiplications and additions of all matrix products and convolutions of a jaxpr, scans counted in full.

    A `while` ends when its data says so: its body counts `loops` times.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in summed)
        elif name == "conv_general_dilated":
            numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        elif name == "cond":
            total += max(product_flops(branch.jaxpr, loops) for branch in equation.params["branches"])
        else:
            times = {"scan": equation.params.get("length", 1), "while": loops}.get(name, 1)
            total += times * sum(product_flops(inner, loops) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr"):
                found.append(item.jaxpr)
            elif hasattr(item, "eqns"):
                found.append(item)
    return found


def masked_attention_flops(
    text: DecoderConfig, rows: int, prompt: int, *, samples: int = 1, fed: int = 0, scored: int = 0
) -> float:
    """Of attention to the prompts of so many rows, forward and backward: the pairs that come later, and those of which
    the two lie in different samples, where `samples` share a row and its `fed` and `scored` tokens.

    The last layer computes no prompt queries. A product with keys and one with values forward, two of each backward.
    """
    own = prompt / samples
    others, layers = prompt - own, text.num_layers - 1
    pairs = layers * (prompt**2 - samples * own * (own + 1) / 2 + fed * others) + scored * others
    return 2 * 3 * 2.0 * pairs * text.num_heads * text.head_dim * rows


def traced_flops(config: TrainConfig, graphdef: nnx.GraphDef, state: TrainState, window: Batch, mesh: Mesh) -> float:
    """Of one update without recomputation, pairs of tokens that attention masks included."""
    parts = {"model": {"remat": "none"}, "parallel": {"strategy": "mesh"}}
    plain = config.model_copy(update={name: getattr(config, name).model_copy(update=to) for name, to in parts.items()})
    model = nnx.merge(graphdef, state.trainable, state.frozen)
    model.attention = "xla"  # products within a kernel cannot be counted
    graphdef, _, _ = split_model(model, plain.model.freeze)
    step = configured_step(plain, graphdef, make_optimizer(plain.optimizer, 100), mesh)
    return product_flops(jax.make_jaxpr(step)(state, window).jaxpr)


def update_flops(config: TrainConfig, graphdef: nnx.GraphDef, state: TrainState, window: Batch, mesh: Mesh) -> float:
    """Useful work of one update on all devices of a mesh; shapes do in place of arrays, those of all rows."""
    micro_batches, rows, prompt = window.prompt_tokens.shape
    samples, fed, scored = config.data.recipe.shape.samples, window.tokens.shape[2], window.target_token.shape[2]
    text = nnx.merge(graphdef, state.trainable, state.frozen).decoder.config
    masked = masked_attention_flops(text, micro_batches * rows, prompt, samples=samples, fed=fed, scored=scored)
    return traced_flops(config, graphdef, state, window, mesh) - masked


class UpdateFlops:
    """Useful work of a run's updates; those whose batches have the same shapes are counted once."""

    def __init__(self, config: TrainConfig, graphdef: nnx.GraphDef, state: TrainState, mesh: Mesh):
        self._config, self._graphdef, self._mesh = config, graphdef, mesh
        self._state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self._known: dict[tuple[tuple[int, ...], ...], float] = {}

    def __call__(self, batch: Batch) -> float:
        """Of an update on a batch of which this host has its part of the rows."""
        hosts = jax.process_count()
        leaves = jax.tree.leaves(batch)
        key = tuple(leaf.shape for leaf in leaves)
        if key not in self._known:

            def everywhere(leaf: Any) -> jax.ShapeDtypeStruct:
                micro_batches, rows, *rest = leaf.shape
                return jax.ShapeDtypeStruct((micro_batches, rows * hosts, *rest), leaf.dtype)

            window = jax.tree.map(everywhere, batch)
            self._known[key] = update_flops(self._config, self._graphdef, self._state, window, self._mesh)
        return self._known[key]
