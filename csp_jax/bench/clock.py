"""Turns, ratios by pairs, and what the machine can do and does besides."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Timed = Callable[[], Mapping[str, float]]  # one turn of a task -> seconds of each of its parts
Seconds = dict[str, Float[np.ndarray, " turns"]]


def in_turns(tasks: Sequence[Timed], repeats: int, done: Callable[[int], None] = lambda turn: None) -> Seconds:
    """A B C A B C ...: seconds of every part, turn by turn. What comes and goes on the machine meets all of them."""
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats):
        for task in tasks:
            for part, value in task().items():
                seconds.setdefault(part, []).append(value)
        done(turn)
    return {part: np.array(values) for part, values in seconds.items()}


def paired_ratio(seconds: Float[np.ndarray, " turns"], reference: Float[np.ndarray, " turns"]) -> float:
    """Median over the turns of a part's time divided by the reference's time in the same turn."""
    return float(np.median(seconds / reference))


class Products:
    """The roofline: square matrix products, one after another, at the platform's default precision."""

    name = "matmul"

    def __init__(self, dtype: jnp.dtype, size: int = 0, count: int = 0):
        accelerator = jax.default_backend() != "cpu"
        # Sizes that run fastest: on CPU operands that stay in the cache, and enough products to be warm.
        self.size, self.count = size or (8192 if accelerator else 1024), count or 32
        self.name = f"matmul {jnp.dtype(dtype).name}"
        self._factor = jnp.eye(self.size, dtype=dtype)
        self._chain = jax.jit(lambda x: jax.lax.fori_loop(0, self.count, lambda _, y: y @ x, x))

    @property
    def flops(self) -> float:
        """Of one turn."""
        return 2.0 * self.size**3 * self.count

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        jax.block_until_ready(self._chain(self._factor))
        return {self.name: time.perf_counter() - start}


def peak_memory() -> tuple[int, str]:
    """Bytes at most held so far, and of what: the device's own statistics, else the process's resident memory."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    if peaks:
        return max(peaks), "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"


def program_bytes(compiled: Any) -> int | None:
    """What one compiled program holds at its peak: arguments, results and temporaries; None if nobody says."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    apart = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + apart + found.temp_size_in_bytes)


class Neighbours:
    """How many cores others kept busy since it was made (Linux; None elsewhere)."""

    def __init__(self) -> None:
        self._start = _clocks()

    def cores(self) -> float | None:
        now = _clocks()
        if now is None or self._start is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._start))
        return max(busy - own, 0.0) / max(wall, 1e-9)


def _clocks() -> tuple[float, float, float] | None:
    """Wall time, busy seconds of all cores, and this process's own."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    user, nice, system, _idle, _waiting, *rest = (int(x) for x in file.read_text().splitlines()[0].split()[1:9])
    return time.perf_counter(), (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK"), time.process_time()
