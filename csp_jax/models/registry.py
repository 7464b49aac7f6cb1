"""The families, by name, and how a checkpoint folder becomes a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csp_jax.errors import UserError
from csp_jax.models.hub import HubConfig, load_state, save_hub
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.llava import Llava

MODELS: dict[str, Any] = {"llava": Llava}


def family_of(config: HubConfig) -> str:
    """The family that `config.json` names."""
    name = config.get("model_type", None)
    if name not in MODELS:
        raise UserError(
            "no such model family",
            file=config.file,
            field="model_type",
            value=name,
            mend=f"Families: {', '.join(MODELS)}",
        )
    return name


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


def load_model(
    directory: Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> VisionLanguageModel:
    """A checkpoint folder in the hub's layout as a model; strict (see `hub.load_state`)."""
    config = HubConfig.read(directory)
    model = abstract_model(config, dtype)
    graphdef, state = nnx.split(model)
    tensors = MODELS[family_of(config)].tensors(model.config)
    return nnx.merge(graphdef, load_state(directory, state, tensors, place=place, dtype=dtype))


def save_model(directory: Path, model: VisionLanguageModel, dtype: jnp.dtype | None = None) -> None:
    """Weights of a model in the hub's layout (its `config.json` and tokenizer are the caller's to copy)."""
    save_hub(directory, nnx.state(model), type(model).tensors(model.config), dtype)
