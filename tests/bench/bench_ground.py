"""A tiny LLaVA that the benchmark made from numbers, and its records."""

from __future__ import annotations

from pathlib import Path

from csp_jax.bench.made import Lengths, Sizes, write_model, write_shards
from csp_jax.bench.run import Settings, made_config
from csp_jax.config import TrainConfig
from csp_jax.families.registry import open_family

SIZES = Sizes(28, 14, tower=(3, 24, 40, 2), decoder=(3, 32, 48, 4), vocabulary=700)
PROMPT = 40
SETTINGS = Settings(rows=8, accumulation=1, samples=3, tokens=4, lengths=Lengths(PROMPT, 16, 28))


def make_ground(folder: Path) -> Path:
    checkpoint = write_model(folder / "checkpoint", SIZES)
    write_shards(folder / "records", open_family(checkpoint), SETTINGS.lengths)
    return folder


def config(ground: Path, task: str, *overrides: str) -> TrainConfig:
    return made_config(task, ground / "checkpoint", ground / "records", SETTINGS, overrides)
