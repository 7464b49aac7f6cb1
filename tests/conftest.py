"""Set before jax is imported anywhere: eight CPU devices for what shards, and quick compilation.

The models here are tiny and each is compiled many times over: nearly all time goes into the compiler unless it is
told not to optimize. `XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest` tests what it makes when it does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("XLA_FLAGS", " ".join(("--xla_force_host_platform_device_count=8", *QUICK_COMPILATION)))

import pytest  # noqa: E402


@pytest.fixture
def exact() -> Iterator[None]:
    """Matrix products in full float32, whatever the device's default."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield
