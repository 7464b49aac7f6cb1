"""The real training step of a configuration, for devices that need not be there: shapes in place of arrays."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from csp_jax.config import TrainConfig
from csp_jax.data.batch import Batch, Shape, empty_batch, with_policy
from csp_jax.families.registry import open_family
from csp_jax.models.decoder import DecoderConfig
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.registry import abstract_model
from csp_jax.sharding import batch_sharding, compile_step, state_shardings
from csp_jax.train.flops import masked_attention_flops, product_flops
from csp_jax.train.loop import batch_shape, configured_step, make_optimizer, wrap_model
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
    shape: Shape
    text: DecoderConfig

    def lower(self) -> jax.stages.Lowered:
        """The step, traced and partitioned, ready to be compiled."""
        step = configured_step(self.config, self.graphdef, self.optimizer(), self.mesh)
        return compile_step(step, self.mesh, self.shardings).lower(self.state, self.window)

    def optimizer(self) -> Any:
        return make_optimizer(self.config.optimizer, max(self.config.run.steps, 100))

    def useful_flops(self) -> float:
        """Of one update, all devices together (see `train.flops`)."""
        masked = masked_attention_flops(self.text, self.shape, self.config.batch.accumulation)
        return self.traced_flops() - masked

    def traced_flops(self) -> float:
        """Of one update without recomputation, pairs of tokens that attention masks included."""
        config = self.config
        parts: dict[str, Any] = {"model": config.model.model_copy(update={"remat": "none"})}
        parts["parallel"] = config.parallel.model_copy(update={"strategy": "mesh"})  # the same work, not mapped
        plain = config.model_copy(update=parts)
        model = nnx.merge(self.graphdef, self.state.trainable, self.state.frozen)
        model.attention = "xla"  # products within a kernel cannot be counted
        graphdef, _, _ = split_model(model, plain.model.freeze)
        step = configured_step(plain, graphdef, self.optimizer(), self.mesh)
        return product_flops(jax.make_jaxpr(step)(self.state, self.window).jaxpr)

    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((self.state.trainable, self.state.frozen)))

    def bytes_a_device(self) -> dict[str, int]:
        """What a device holds of parameters, optimizer state and batch between two steps."""
        return {
            "parameters": _shard_bytes(
                (self.state.trainable, self.state.frozen), (self.shardings.trainable, self.shardings.frozen)
            ),
            "optimizer": _shard_bytes(self.state.optimizer, self.shardings.optimizer),
            "batch": _shard_bytes(self.window, jax.tree.map(lambda _: batch_sharding(self.mesh), self.window)),
        }


def _shard_bytes(values: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


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

    def window(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch.accumulation, *array.shape), array.dtype)

    one_row = empty_batch(dataclasses.replace(shape, rows=1))
    one_row = with_policy(one_row) if config.loss.name == "grpo" else one_row
    whole = jax.tree.map(lambda array: np.broadcast_to(array, (shape.rows, *array.shape[1:])), one_row)
    return StepProgram(
        config,
        mesh,
        graphdef,
        state,
        state_shardings(mesh, state),
        jax.tree.map(window, whole),
        shape,
        model.decoder.config,
    )
