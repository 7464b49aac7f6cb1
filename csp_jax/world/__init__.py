"""The embedded world: rendered scenes with exact masks and questions, deterministic from a seed."""

from pathlib import Path

from csp_jax.world.config import WorldConfig
from csp_jax.world.world import World, build

BASE = Path(__file__).parent / "base"  # the checkpoint that is trained on it and ships with the package

__all__ = ["BASE", "World", "WorldConfig", "build"]
