"""A batch of any family's pictures and words, and an adapter trained on it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import pack, stack
from tiny_families import CELL, WORDS, family_model, family_picture

from csp_jax.config import OptimizerConfig
from csp_jax.data.batch import Batch, Branch, Sample, Shape
from csp_jax.losses.sft import SftLoss
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import add_adapter
from csp_jax.perturb import Schedule
from csp_jax.train.configured import make_optimizer
from csp_jax.train.state import TrainState, new_state, split_model
from csp_jax.train.step import make_step


def family_batch(family: str, model: VisionLanguageModel, seed: int = 0) -> Batch:
    """One row: a picture, words around it, two answers."""
    generator = np.random.default_rng(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in generator.integers(*WORDS, count))

    picture, slots = family_picture(family, generator, (1, 2))
    prompt = words(2) + (model.image_token,) * slots + words(2)
    answers = tuple(Branch(words(4), (1.0,) * 4) for _ in range(2))
    shape = Shape(1, len(prompt), 1, 8, 8, 2, 1, (CELL[family], CELL[family]), 4)
    return pack(shape, [Sample(prompt, (picture,), (answers,))])


def trained(
    family: str, targets: Sequence[str], steps: int, model: VisionLanguageModel | None = None
) -> tuple[TrainState, TrainState, list[float]]:
    """States before and after some steps of an adapter, and the losses."""
    model = model or family_model(family)
    add_adapter(model, targets, rank=3, alpha=6, dropout=0.05)
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(config, steps)
    graphdef, _, _ = split_model(model, ())
    step = jax.jit(make_step(graphdef, SftLoss(), optimizer, schedule=Schedule("none"), seed=0))
    state = new_state(model, optimizer, ())
    before = jax.tree.map(jnp.copy, state)  # the model is changed below
    window, losses = stack([family_batch(family, model)]), []
    for _ in range(steps):
        state, metrics = step(state, window)
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.trainable)
    return before, state, losses
