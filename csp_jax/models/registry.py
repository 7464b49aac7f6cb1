"""The families, by name, and how a checkpoint folder becomes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from csp_jax.families.registry import family_name
from csp_jax.models.hub import HubConfig, HubFolder, Place, load_state, save_hub
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.internvl2 import InternVL2
from csp_jax.models.llava import Llava
from csp_jax.models.phi3_vision import Phi3Vision
from csp_jax.models.qwen2_vl import Qwen2VL
from csp_jax.models.qwen_vl import QwenVL
from csp_jax.sharding import leaf_spec

MODELS: dict[str, Any] = {
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
    "internvl2": InternVL2,
    "phi3_vision": Phi3Vision,
    "qwen_vl": QwenVL,
}


def family_of(config: HubConfig) -> str:
    """The family that `config.json` names."""
    return family_name(config.get("model_type", None), config.file)


def abstract_model(config: HubConfig, dtype: jnp.dtype = jnp.float32) -> VisionLanguageModel:
    """The model with shapes only."""
    family = MODELS[family_of(config)]
    settings = family.config_class.from_hub(config)
    return nnx.eval_shape(lambda: family(settings, dtype=dtype, rngs=nnx.Rngs(0)))


def new_model(config: HubConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> VisionLanguageModel:
    """The model with random weights."""
    family = MODELS[family_of(config)]
    settings = family.config_class.from_hub(config)
    return nnx.jit(lambda: family(settings, dtype=dtype, rngs=nnx.Rngs(seed)))()


def placed_on(mesh: Mesh) -> Place:
    """Puts each leaf on a mesh as the sharding rules say, without a whole copy on any device."""

    def place(variable: nnx.Variable, array: np.ndarray) -> jax.Array:
        axes = tuple(variable.get_metadata().get("axes", ()))
        sharding = NamedSharding(mesh, leaf_spec(mesh, array.shape, axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return place


def load_model(
    directory: Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    config: HubConfig | None = None,
) -> VisionLanguageModel:
    """A checkpoint folder in the hub's layout as a model, on a mesh if one is given; strict (see `hub.load_state`)."""
    config = config or HubConfig.read(directory)
    model = abstract_model(config, dtype)
    family = type(model)
    graphdef, state = nnx.split(model)
    folder = HubFolder(directory, family.aliases)
    duplicates = family.duplicates(model.config)
    place = placed_on(mesh) if mesh is not None else None
    state = load_state(
        folder, state, family.tensors(model.config), duplicates=duplicates, place=place, dtype=jnp.dtype(dtype)
    )
    loaded = nnx.merge(graphdef, state)
    loaded.repeated = tuple(key for key in duplicates if key in folder.where)
    return loaded


def save_model(directory: Path, model: VisionLanguageModel, dtype: jnp.dtype | None = None) -> None:
    """Weights of a model in the hub's layout (its `config.json` and tokenizer are the caller's to copy)."""
    family = type(model)
    repeated = {key: original for key, original in family.duplicates(model.config).items() if key in model.repeated}
    save_hub(directory, nnx.state(model), family.tensors(model.config), dtype, duplicates=repeated)
