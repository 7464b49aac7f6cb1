"""The families, by name, and how a checkpoint folder becomes a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from csp_jax.errors import UserError, full_disk_named
from csp_jax.families.registry import family_name
from csp_jax.models.hub import HubConfig, HubFolder, companions, load_state, save_hub
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.internvl2 import InternVL2
from csp_jax.models.llava import Llava
from csp_jax.models.lora import LoraParam, merge_adapter
from csp_jax.models.native import is_native, load_native, save_native
from csp_jax.models.peft import CONFIG, is_adapter, load_adapter, read_config
from csp_jax.models.phi3_vision import Phi3Vision
from csp_jax.models.qwen2_vl import Qwen2VL
from csp_jax.models.qwen_vl import QwenVL
from csp_jax.sharding import leaf_spec
from csp_jax.world import BASE

MODELS: dict[str, Any] = {
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
    "internvl2": InternVL2,
    "phi3_vision": Phi3Vision,
    "qwen_vl": QwenVL,
}


def checkpoint_folder(name: str) -> Path:
    """A model's folder; `world` is the base that ships with the package."""
    folder = BASE if name == "world" else Path(name)
    if not folder.is_dir():
        raise UserError("there is no such checkpoint folder", file=folder, mend="Give a folder in the hub's layout")
    return folder


def adapter_base(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on."""
    name = read_config(adapter).get("base_model_name_or_path") or ""
    try:
        return checkpoint_folder(name)
    except UserError:
        raise UserError(
            "the adapter's base is not there",
            file=adapter / CONFIG,
            field="base_model_name_or_path",
            value=name,
            mend="Correct the path, or name the model and give the folder by --adapter",
        ) from None


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


def leaf_sharding(mesh: Mesh | None) -> Callable[[nnx.Variable], Sharding]:
    """Where each leaf goes: on a mesh as the sharding rules say, else on the first device."""
    if mesh is None:
        first = SingleDeviceSharding(jax.local_devices()[0])
        return lambda variable: first

    def choose(variable: nnx.Variable) -> Sharding:
        axes = tuple(variable.get_metadata().get("axes", ()))
        return NamedSharding(mesh, leaf_spec(mesh, variable.get_value().shape, axes))

    return choose


def load_model(
    directory: Path,
    *,
    dtype: jnp.dtype | None = jnp.float32,
    mesh: Mesh | None = None,
    config: HubConfig | None = None,
    adapter: Path | None = None,
) -> VisionLanguageModel:
    """A checkpoint folder (the hub's layout or our own) as a model, on a mesh if one is given.

    Strict and streamed (see `hub.load_state`); `dtype` None keeps the precision of the files. The folder of an adapter
    is its base with the adapter on it. `adapter`: one in PEFT's layout to put on the model, wherever it was trained.
    """
    if is_adapter(directory):
        model = load_model(adapter_base(directory), dtype=dtype, mesh=mesh, adapter=directory)
    else:
        model = _load_plain(directory, dtype, mesh, config)
    if adapter is not None:
        model = merge_adapter(model)
        load_adapter(model, adapter)
        sharding = leaf_sharding(mesh)
        for variable in jax.tree.leaves(nnx.variables(model, LoraParam), is_leaf=lambda x: isinstance(x, LoraParam)):
            variable[...] = jax.device_put(variable[...], sharding(variable))
    return model


def _load_plain(
    directory: Path, dtype: jnp.dtype | None, mesh: Mesh | None, config: HubConfig | None
) -> VisionLanguageModel:
    config = config or HubConfig.read(directory)
    model = abstract_model(config, jnp.float32 if dtype is None else dtype)
    graphdef, state = nnx.split(model)
    sharding, wanted = leaf_sharding(mesh), None if dtype is None else jnp.dtype(dtype)
    if is_native(directory):
        state, repeated = load_native(directory, state, sharding, wanted)
    else:
        family = type(model)
        folder, duplicates = HubFolder(directory, family.aliases), family.duplicates(model.config)

        def place(variable: nnx.Variable, array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding(variable), lambda part: array[part])

        state = load_state(
            folder, state, family.tensors(model.config), duplicates=duplicates, place=place, dtype=wanted
        )
        repeated = tuple(key for key in duplicates if key in folder.where)
    loaded = nnx.merge(graphdef, state)
    loaded.repeated = repeated
    return loaded


def import_model(source: Path, out: Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> None:
    """A hub folder as one of ours: weights stacked, the other files copied; it appears whole or not at all.

    An adapter's folder becomes a model with the adapter merged.
    """
    if out.exists():
        raise UserError("is there already", file=out, mend="Choose another folder or delete it")
    model = merge_adapter(load_model(source, dtype=dtype, mesh=mesh))
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with full_disk_named(temporary):
        for file in companions(source):
            shutil.copyfile(file, temporary / file.name)
        save_native(temporary, nnx.state(model), model.repeated)
    temporary.rename(out)


def save_model(directory: Path, model: VisionLanguageModel, dtype: jnp.dtype | None = None) -> None:
    """Weights of a model in the hub's layout (its `config.json` and tokenizer are the caller's to copy)."""
    family = type(model)
    repeated = {key: original for key, original in family.duplicates(model.config).items() if key in model.repeated}
    save_hub(directory, nnx.state(model), family.tensors(model.config), dtype, duplicates=repeated)
