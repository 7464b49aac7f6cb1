"""One world and some of its records, shared by the tests of this folder."""

from __future__ import annotations

import pytest

from csp_jax.records import Record
from csp_jax.world import World, WorldConfig

SCENES = 500


@pytest.fixture(scope="session")
def world() -> World:
    return World(WorldConfig())


@pytest.fixture(scope="session")
def records(world: World) -> dict[str, list[Record]]:
    return {
        "base": [world.record("base", index) for index in range(SCENES)],
        "test": [world.record("test", index) for index in range(SCENES)],
    }
