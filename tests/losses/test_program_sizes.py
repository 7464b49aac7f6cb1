"""What a step never computes: logits of all tokens, masks of all against all, the prompt once more a response."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import SIDE, tiny_model

from csp_jax.data.batch import Shape, empty_batch
from csp_jax.losses.logprobs import score
from csp_jax.train.configured import REMAT
from csp_jax.train.flops import product_flops

VOCABULARY, WIDTH, HEADS = 1009, 32, 4
ROWS, PROMPT = 2, 24
CHUNK = 64


def program(samples: int, length: int, *, prompt: int = PROMPT, attention: str = "xla", remat: str = "none") -> Any:
    """Loss and gradient of a row's `samples` flat responses of so many tokens, as JAX traces them."""
    model = tiny_model(vocab_size=VOCABULARY)
    model.attention = attention
    graphdef, state = nnx.split(model)
    batch = empty_batch(Shape(ROWS, prompt, samples, length, length, samples, 1, (SIDE, SIDE)))
    pixels = jnp.zeros((ROWS, 1, SIDE, SIDE, 3))

    def loss(state: nnx.State) -> jax.Array:
        return score(nnx.merge(graphdef, state), batch, pixels, remat=REMAT[remat], chunk=CHUNK).log_probs.sum()

    return jax.make_jaxpr(jax.value_and_grad(loss))(state).jaxpr


def inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item


def arrays(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of everything that is computed, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for part in inner(equation):
            yield from arrays(part)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_logits_exist_for_a_chunk_of_scored_slots(remat):
    """Neither of the prompt, nor of all responses at once."""
    found = {shape for shape in arrays(program(8, 32, remat=remat)) if shape[-1:] == (VOCABULARY,)}
    logits = found - {(WIDTH, VOCABULARY)}  # but for the head itself and its gradient
    assert (ROWS, CHUNK // ROWS, VOCABULARY) in logits
    assert max(math.prod(shape[:-1]) for shape in logits) == CHUNK
    assert ROWS * 8 * 32 > 4 * CHUNK


@pytest.mark.parametrize("attention", ["xla", "pallas_interpret"])
def test_no_array_has_all_responses_against_all(attention):
    """Of K responses of R tokens a row, attention makes K R (P + R), not (P + K R) squared."""
    samples, length = 16, 32
    everything = samples * length
    shapes = set(arrays(program(samples, length, attention=attention, remat="full")))
    largest = max((shape for shape in shapes if shape[-1:] != (VOCABULARY,)), key=math.prod)
    assert math.prod(largest) <= ROWS * HEADS * everything * (PROMPT + length)
    assert math.prod(largest) < everything**2 < (PROMPT + everything) ** 2
    of_pairs = [shape for shape in shapes if len(shape) > 2 and shape[-1] != VOCABULARY]
    assert [shape for shape in of_pairs if min(sorted(shape)[-2:]) >= everything] == []


def test_work_grows_by_the_same_with_every_response():
    """What does not grow is the prompt and its picture: computed once, and the same however long the responses are."""

    def work(samples: int, length: int) -> float:
        return product_flops(program(samples, length))

    assert work(12, 16) - work(8, 16) == work(8, 16) - work(4, 16) > 0
    once = [2 * work(4, length) - work(8, length) for length in (16, 32, 48)]
    assert once[0] == once[1] == once[2] > 0


def kept(jaxpr: Any) -> int:
    """Values that loops hand on from step to step's end: what layers keep for their gradients, and the gradients."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            stacked = equation.outvars[equation.params["num_carry"] :]
            total += sum(math.prod(variable.aval.shape) for variable in stacked)
        else:
            total += sum(kept(part) for part in inner(equation))
    return total


@pytest.mark.parametrize("attention", ["xla", "splash_interpret"])
def test_what_is_kept_and_what_is_computed_again(attention):
    """Each policy keeps less than the one before it; a kernel runs twice unless its results are kept.

    Of kernels this is read where JAX itself leaves out what nobody reads, as it does of those within a loop.
    """
    policies = ("none", "weights", "save_names", "full")
    programs = {name: program(2, 16, prompt=96, attention=attention, remat=name) for name in policies}
    sizes = [kept(programs[name]) for name in policies]
    work = [product_flops(programs[name]) for name in policies]
    assert sizes == sorted(set(sizes), reverse=True)
    if attention == "xla":
        assert work[0] < work[1] < work[2] < work[3]
        return
    runs = {name: count(programs[name], "pallas_call") for name in policies}
    assert runs["save_names"] == runs["none"] < runs["weights"] == runs["full"]


def count(jaxpr: Any, primitive: str) -> int:
    """How often a primitive is written in a program."""
    return sum(
        (equation.primitive.name == primitive) + sum(count(part, primitive) for part in inner(equation))
        for equation in jaxpr.eqns
    )
