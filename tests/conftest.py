"""Eight CPU devices for every test that shards (set before jax is imported anywhere), and what tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import pytest


@pytest.fixture
def exact() -> Iterator[None]:
    """Matrix products in full float32, whatever the device's default."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield
