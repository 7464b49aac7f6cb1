"""A tiny model on a small world, its GRPO configuration, and a reward that such a model can get."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import tiny_model, tiny_values, write_folder

from csp_jax.config import TrainConfig
from csp_jax.models.registry import save_model
from csp_jax.rewards.interface import Said
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

WORLD = WorldConfig(statistics_scenes=100)
SAMPLES, TOKENS = 4, 5


def make_ground(folder: Path) -> Path:
    """A checkpoint folder, and a world of forty scenes."""
    values = tiny_values(vocab_size=400, num_hidden_layers=2)
    write_folder(folder / "checkpoint", values, build_tokenizer(WORLD, scenes=20, vocab_size=400))
    save_model(folder / "checkpoint", tiny_model(vocab_size=400, num_hidden_layers=2))
    build(WORLD, folder / "world", {"train": 40})
    return folder


def values(ground: Path, out: Path, *, lora: bool = True, rows: int = 8, **changes: Any) -> dict[str, Any]:
    """A run of four samples of up to five tokens to each of `rows` x 2 questions."""
    adapter = {"lora": {"rank": 3, "alpha": 6.0, "targets": [r"decoder\.", "projector"]}} if lora else {}
    return {
        "seed": 1,
        "model": {"checkpoint": str(ground / "checkpoint"), **adapter},
        "data": {"shards": str(ground / "world"), "recipe": {"name": "questions", "shape": {"prompt": 48}}},
        "noise": {"name": "none"},
        "loss": {"name": "grpo"},
        "rollout": {"samples": SAMPLES, "max_tokens": TOKENS, "rounds": 2, **changes.pop("rollout", {})},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "batch": {"rows": rows, "accumulation": 2},
        "run": {"out": str(out), "steps": 6, "checkpoint_every": 3, "progress": False},
        **changes,
    }


def config(ground: Path, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(values(ground, out, **changes))


def chance(said: Sequence[Said]) -> list[float]:
    """0, 1 or 2, as the words have it: random models never say the truth."""
    return [float(zlib.crc32(f"{one.item.id} {one.text}".encode()) % 3) for one in said]
