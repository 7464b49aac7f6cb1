"""The real training step of a configuration, for devices that need not be there: shapes in place of arrays."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from csp_jax.config import TrainConfig
from csp_jax.data.batch import Batch, Shape, empty_batch, with_policy
from csp_jax.families.registry import open_family
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.registry import abstract_model
from csp_jax.policy import question_shape, sampling_for
from csp_jax.rollout import sample_batch
from csp_jax.sharding import batch_sharding, compile_step, device_bytes, state_shardings
from csp_jax.train.configured import configured_step, make_optimizer
from csp_jax.train.flops import update_flops
from csp_jax.train.loop import batch_shape, wrap_model
from csp_jax.train.state import TrainState, new_state, split_model


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """What is compiled: the step, its state with a place for every leaf, its batch."""

    config: TrainConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    state: TrainState
    shardings: TrainState
    window: Batch

    def lower(self) -> jax.stages.Lowered:
        """The step, traced and partitioned, ready to be compiled."""
        step = configured_step(self.config, self.graphdef, self.optimizer(), self.mesh)
        return compile_step(step, self.mesh, self.shardings).lower(self.state, self.window)

    def sampler_arguments(self) -> tuple[Any, Batch, jax.ShapeDtypeStruct]:
        """What `policy.Rollouts` gives its sampler: parameters, questions, seeds."""
        config, rows = self.config, batch_sharding(self.mesh, leading=0)
        values, places = ((state.trainable, state.frozen) for state in (self.state, self.shardings))
        count, cell = self.sampled_rows(), self.window.canvas.shape[-3:-1]
        batch = _abstract_batch(question_shape(config, count, cell), ())
        batch = jax.tree.map(lambda leaf: _placed(leaf, rows), batch)
        seeds = jax.ShapeDtypeStruct((count, config.rollout.samples), jnp.uint32, sharding=rows)
        return jax.tree.map(_placed, values, places), batch, seeds

    def lower_sampler(self) -> jax.stages.Lowered:
        """The sampler of a GRPO run; which token ends an answer does not matter here."""
        dtype, sampling = jnp.dtype(self.config.model.dtype), sampling_for(self.config.rollout, 0)
        return sample_batch.lower(self.graphdef, sampling, dtype, *self.sampler_arguments())

    def sampled_rows(self) -> int:
        """Prompts that are sampled at once."""
        return self.config.rollout.rows or self.config.batch.rows * self.config.batch.accumulation

    def optimizer(self) -> Any:
        return make_optimizer(self.config.optimizer, max(self.config.run.steps, 100))

    def useful_flops(self) -> float:
        """Of one update, all devices together (see `train.flops`)."""
        return update_flops(self.config, self.graphdef, self.state, self.window, self.mesh)

    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((self.state.trainable, self.state.frozen)))

    def bytes_a_device(self) -> dict[str, int]:
        """What a device holds of parameters, optimizer state and batch between two steps."""
        return {
            "parameters": device_bytes(
                (self.state.trainable, self.state.frozen), (self.shardings.trainable, self.shardings.frozen)
            ),
            "optimizer": device_bytes(self.state.optimizer, self.shardings.optimizer),
            "batch": device_bytes(self.window, jax.tree.map(lambda _: batch_sharding(self.mesh), self.window)),
        }


def planned_model(config: TrainConfig, folder: Path) -> VisionLanguageModel:
    """What `train.loop.Run` would load, as shapes; a new adapter, as configured, on it."""
    model = abstract_model(HubConfig.read(folder), jnp.dtype(config.model.param_dtype))

    def wrap(model: VisionLanguageModel) -> VisionLanguageModel:
        wrap_model(model, config)
        return model

    return nnx.eval_shape(wrap, model)


def step_program(config: TrainConfig, folder: Path, mesh: Mesh) -> StepProgram:
    """The step of a configuration; `folder` holds the `config.json` of its model (weights are not needed)."""
    model = planned_model(config, folder)
    graphdef, _, _ = split_model(model, config.model.freeze)
    optimizer = make_optimizer(config.optimizer, 100)
    state = nnx.eval_shape(lambda model: new_state(model, optimizer, config.model.freeze), model)
    shape = batch_shape(config, config.batch.rows, open_family(folder, words=False).cell)

    window = _abstract_batch(shape, (config.batch.accumulation,), policy=config.loss.name == "grpo")
    return StepProgram(config, mesh, graphdef, state, state_shardings(mesh, state), window)


def _abstract_batch(shape: Shape, leading: tuple[int, ...], *, policy: bool = False) -> Batch:
    """The shapes of a batch, `leading` axes first; with `policy` those of sampled responses too."""
    one_row = empty_batch(dataclasses.replace(shape, rows=1))
    one_row = with_policy(one_row) if policy else one_row
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((*leading, shape.rows, *array.shape[1:]), array.dtype), one_row
    )


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
