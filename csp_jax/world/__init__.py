"""The embedded world: rendered scenes with exact masks and questions, deterministic from a seed."""

from csp_jax.world.config import WorldConfig
from csp_jax.world.world import World, build

__all__ = ["World", "WorldConfig", "build"]
