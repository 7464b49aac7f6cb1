"""Useful work of a training step: what the mathematics asks for, nothing that is computed twice or masked away.

Counted on the step itself as JAX traces it, without recomputation of activations: every matrix product of the vision
tower, the projector, the decoder and the head, forward and backward, as often as its loop runs. What is frozen has no
gradient and costs none. Of the prompt's attention, which computes all pairs, the half that causality masks is taken
off.
"""

from __future__ import annotations

import math
from typing import Any

from csp_jax.data.batch import Shape
from csp_jax.models.decoder import DecoderConfig


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


def masked_attention_flops(text: DecoderConfig, shape: Shape, micro_batches: int) -> float:
    """Of the prompt's self-attention, forward and backward: the pairs that come later.

    The last layer computes no prompt queries. A product with keys and one with values forward, two of each backward.
    """
    pairs = shape.prompt * (shape.prompt - 1) / 2
    products = 2 * 3 * 2.0 * pairs * text.num_heads * text.head_dim
    return products * shape.rows * micro_batches * (text.num_layers - 1)
