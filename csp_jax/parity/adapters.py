"""Adapters through PEFT's files: what is read is what was written, and does to the original what PEFT says.

By PEFT's definition a module's weight W acts as W + alpha / r * B A. That sum, made of the file's tensors and the
checkpoint's, is compared with the export of our merged model, which knows nothing of the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csp_jax.models.hub import canonical_key, hub_arrays
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import LoraParam, adapted, add_adapter, merge_adapter
from csp_jax.models.peft import CONFIG, LETTERS, PREFIX, WEIGHTS, load_adapter
from csp_jax.models.peft_writer import save_adapter
from csp_jax.models.tensor_files import TensorFile

ADAPTER_TOLERANCE = 1e-5  # of the original's tensors


def check_adapter(model: VisionLanguageModel) -> Iterator[tuple[str, float, float]]:
    """An adapter on every linear layer, written and read: (what, difference, limit)."""
    wrapped, again = (nnx.merge(*nnx.split(model)) for _ in range(2))
    add_adapter(wrapped, ("",), rank=2, alpha=3)
    for number, (_, layer) in enumerate(adapted(wrapped)):
        layer.lora_b[...] = jax.random.normal(jax.random.key(number), layer.lora_b.shape)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_adapter(folder, wrapped, base="")
        load_adapter(again, folder)
        written, found = (jax.tree.leaves(nnx.variables(one, LoraParam)) for one in (wrapped, again))
        same = sum(a.shape == b.shape and bool(jnp.array_equal(a, b)) for a, b in zip(written, found))
        yield "adapter", float(max(len(written), len(found)) - same), 0.0
        wanted = _by_definition(model, folder)
    merged = hub_arrays(nnx.state(merge_adapter(wrapped)), type(model).tensors(model.config))
    gap = max(float(np.abs(merged[key] - weight).max()) for key, weight in wanted.items())
    yield "adapter, merged", gap, ADAPTER_TOLERANCE


def _by_definition(model: VisionLanguageModel, folder: Path) -> dict[str, np.ndarray]:
    family, file = type(model), TensorFile(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    weights = hub_arrays(nnx.state(model), family.tensors(model.config))
    for name in {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in file.entries}:
        a, b = (file.read(f"{PREFIX}{name}.lora_{letter}.weight") for letter in LETTERS)
        alphas = (alpha for end, alpha in config["alpha_pattern"].items() if f".{name}".endswith(f".{end}"))
        scale = next(alphas, config["lora_alpha"]) / len(a)
        weights[canonical_key(f"{name}.weight", family.aliases)] += np.float32(scale) * (b @ a)
    return weights
