"""Prompts of any family, what the sampler says to them, and what `score` says of that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tiny import pack
from tiny_families import CELL, WORDS, family_picture

from csp_jax.data.batch import Batch, Branch, Sample, Shape
from csp_jax.losses.logprobs import score
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import to_canvas
from csp_jax.rollout import Samples, Sampling, make_sampler

TOKENS = 6
PROMPT = {"qwen_vl": 280}
GRIDS = ((2, 3), (1, 1), (1, 2))


def prompts(family: str, image_token: int, seed: int, grids: Sequence[tuple[int, int] | None] = GRIDS) -> list[Sample]:
    """Text, a picture (or none) and text, of unlike lengths."""
    generator = np.random.default_rng(seed)

    def words(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in generator.integers(*WORDS, generator.integers(low, high + 1)))

    found = []
    for grid in grids:
        tokens, pictures = words(1, 3), []
        if grid is not None:
            picture, slots = family_picture(family, generator, grid)
            tokens += (image_token,) * slots
            pictures.append(picture)
        found.append(Sample(tokens + words(2, 9), tuple(pictures), ()))
    return found


def shape(family: str, rows: int, samples: int = 0, length: int = TOKENS) -> Shape:
    """Room for prompts and, with `samples`, for as many flat branches."""
    side, fed = CELL[family], max(length - 1, 0) if samples else 0
    targets = length if samples else 0
    return Shape(rows, PROMPT.get(family, 60), samples, fed, targets, samples, 2, (side, side), 8)


def pads(batch: Batch, left: bool) -> Batch:
    """The same prompts, padded on the other side."""
    if not left:
        return batch
    for row, segment in enumerate(batch.prompt_segment):
        count = int((segment > 0).sum())
        for values in (batch.prompt_tokens[row], batch.prompt_segment[row]):
            values[:] = np.roll(values, len(values) - count)
    return batch


def sample(
    model: VisionLanguageModel, batch: Batch, seeds: Any, sampling: Sampling, dtype: Any = np.float32
) -> Samples:
    """What the compiled sampler says, on the host."""
    graphdef, state = nnx.split(model)
    found = make_sampler(graphdef, sampling, dtype=dtype)(state, batch, np.asarray(seeds, np.uint32))
    return jax.tree.map(np.asarray, found)


def answered(prompts: Sequence[Sample], said: Samples) -> list[Sample]:
    """The prompts with their samples as flat branches."""
    rows = []
    for row, prompt in enumerate(prompts):
        branches = [
            Branch(tuple(map(int, tokens[:length])), (1.0,) * int(length))
            for tokens, length in zip(said.tokens[row], said.length[row])
        ]
        rows.append(Sample(prompt.prompt, prompt.pictures, tuple((branch,) for branch in branches)))
    return rows


@functools.partial(jax.jit, static_argnums=(0, 3))
def _score(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, dtype: Any) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return score(model, batch, model.pixels(batch, to_canvas(batch.canvas)), dtype=dtype).log_probs


def scored(
    model: VisionLanguageModel, family: str, prompts: Sequence[Sample], said: Samples, dtype: Any = np.float32
) -> np.ndarray:
    """`score`'s log-probabilities of what was said [rows, samples, tokens]; 0 behind the end."""
    rows, samples, tokens = said.tokens.shape
    batch = pack(shape(family, rows, samples, tokens), answered(prompts, said), share_rows=False)
    log_probs = np.asarray(_score(*nnx.split(model), batch, np.dtype(dtype)))
    return (log_probs * (batch.target_weight != 0)).reshape(said.tokens.shape)
