"""A random small model of every family, and pictures of any grid for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_folders import FAMILIES
from tiny import GOLDEN, random_leaf

from csp_jax.config import apply_overrides
from csp_jax.data.batch import Picture
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.registry import abstract_model

# What is made smaller than in the golden files: pictures.
SMALLER = {
    "llava": ["vision_config.image_size=28"],
    "qwen2_vl": [],
    "internvl2": [],
    "phi3_vision": ["_tiny_clip_config.image_size=56"],
    "qwen_vl": ["visual.image_size=56"],
}
CELL = {"llava": 28, "qwen2_vl": 28, "internvl2": 56, "phi3_vision": 56, "qwen_vl": 56}
WORDS = (4, 290)  # ordinary tokens in every vocabulary


def family_config(family: str, *settings: str) -> HubConfig:
    values = json.loads((GOLDEN / FAMILIES[family] / "config.json").read_text())
    return HubConfig(apply_overrides(values, [*SMALLER[family], *settings]), Path("config.json"))


def fill(model: VisionLanguageModel, seed: int = 0) -> VisionLanguageModel:
    """Random weights in place of shapes."""
    graphdef, state = nnx.split(model)
    generator = np.random.default_rng(seed)
    filled: list[Any] = [
        (path, leaf.replace(jnp.asarray(random_leaf(".".join(map(str, path)), leaf.get_value().shape, generator))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def family_model(family: str, *settings: str, seed: int = 0) -> VisionLanguageModel:
    return fill(abstract_model(family_config(family, *settings)), seed)


def family_picture(family: str, generator: np.random.Generator, grid: tuple[int, int]) -> tuple[Picture, int]:
    """A picture of a grid (1 x 1 where the family has no other) and how many prompt slots it fills."""
    side = CELL[family]
    rows, columns = grid if family in ("qwen2_vl", "internvl2", "phi3_vision") else (1, 1)
    tiles = rows * columns
    slots = {
        "llava": 4,
        "qwen2_vl": tiles,
        "internvl2": 4 * (tiles + (tiles > 1)),
        "phi3_vision": rows * 2 * (columns * 2 + 1) + 1 + 2 * 3,
        "qwen_vl": 256,
    }[family]
    pixels = generator.integers(0, 256, (side * rows, side * columns, 3), dtype=np.uint8)
    view = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    overview = view if family == "phi3_vision" or (family == "internvl2" and tiles > 1) else None
    return Picture(pixels, np.zeros(pixels.shape[:2], bool), 100.0, 7, (side, side), overview), slots
