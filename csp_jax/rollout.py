"""Sampling from a model: what it says after a prompt."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from csp_jax.data.batch import Batch, Branch, Packer, Picture, Sample, Shape
from csp_jax.families.interface import HostFamily
from csp_jax.losses.logprobs import score
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import to_canvas


@functools.partial(jax.jit, static_argnums=0)
def _continue_greedily(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Int[Array, " tokens"]:
    """The most likely token at every step of one chain; the tokens after the step are padding that nobody sees."""
    model = nnx.merge(graphdef, state)
    pixels = None if batch.canvas is None else model.pixels(batch, to_canvas(batch.canvas))
    steps = batch.target_token.shape[1]

    def step(number: Array, tokens: Array) -> Array:
        said = score(model, dataclasses.replace(batch, tokens=tokens[:, :-1]), pixels).top_token
        return jax.lax.dynamic_update_slice(tokens, said[:, number][:, None], (0, number))

    return jax.lax.fori_loop(0, steps, step, jnp.zeros((1, steps), jnp.int32))[0]


def greedy_answer(
    model: VisionLanguageModel, family: HostFamily, picture: Picture, question: str, *, most: int = 32
) -> str:
    """What a model answers to a question about one picture: greedy text up to the end mark, at most `most` tokens."""
    slots = (family.image_tokens(picture.canvas),)
    prompt = family.encode(question, None, slots).tokens
    chain = Branch((0,) * most, (1.0,) * most)
    cell = picture.cell or picture.canvas.shape[:2]
    shape = Shape(1, -(-len(prompt) // 16) * 16, 1, most - 1, most, 1, 1, cell, picture.cells)
    packer = Packer(shape)
    packer.add(Sample(prompt, (picture,), ((chain,),)))
    tokens = np.asarray(_continue_greedily(*nnx.split(model), packer.batch)).tolist()
    end = family.tokenizer.token_to_id(family.end_of_answer)
    kept = tokens[: tokens.index(end)] if end in tokens else tokens
    return family.tokenizer.decode(kept).strip()
