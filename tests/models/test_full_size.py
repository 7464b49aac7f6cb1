"""The released models in full size, as shapes: the published sizes, and a leaf for every checkpoint key."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import GOLDEN

from csp_jax.models.hub import HubConfig, flat_paths
from csp_jax.models.registry import abstract_model

RELEASED = json.loads((GOLDEN / "full_size.json").read_text())
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", RELEASED)
def test_released_model(name):
    """Its leaves have as many values as the model card says, and each is filled from the checkpoint once."""
    entry = RELEASED[name]
    model = abstract_model(HubConfig(entry["config"], Path("config.json")), jnp.bfloat16)
    leaves = {path: leaf.get_value().shape for path, leaf in flat_paths(nnx.state(model)).items()}
    count = sum(math.prod(shape) for shape in leaves.values())
    assert count == entry["parameters"]
    assert f"{count / 1e9:.3g}B" == entry["published"]
    tensors = type(model).tensors(model.config)
    assert {tensor.path for tensor in tensors} == set(leaves)
    assert len({key for tensor in tensors for key in tensor.keys}) == entry["tensors"]
    for tensor in tensors:  # a stacked leaf has one tensor a layer
        assert not tensor.stacked or len(tensor.keys) == leaves[tensor.path][0], tensor.path
    if name == "Qwen-VL-Chat":
        assert entry["tensors"] == 853  # as published, in ten files


def test_the_documentation_lists_them():
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d,]+) \| ([\d,]+) \|", DOCS.read_text(), re.MULTILINE)
    wanted = [(name, f"{entry['parameters']:,}", f"{entry['tensors']:,}") for name, entry in RELEASED.items()]
    assert rows == wanted
