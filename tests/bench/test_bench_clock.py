"""Turns, and what is reckoned from them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from csp_jax.bench.clock import Neighbours, Products, in_turns, paired_ratio, peak_memory
from csp_jax.bench.run import reference_of, row_of
from csp_jax.bench.work import Work


def test_tasks_take_turns():
    order: list[str] = []
    ticks = iter(range(100))

    def task(*parts: str):
        def turn() -> dict[str, float]:
            order.append(parts[0])
            return {part: float(next(ticks)) for part in parts}

        return turn

    seconds = in_turns([task("a"), task("b", "b half"), task("c")], 2)
    assert order == ["a", "b", "c", "a", "b", "c"]
    assert {part: values.tolist() for part, values in seconds.items()} == {
        "a": [0, 4],
        "b": [1, 5],
        "b half": [2, 6],
        "c": [3, 7],
    }


def test_ratios_are_of_pairs():
    """A machine that slows down by turns changes times and leaves ratios."""
    generator = np.random.default_rng(0)
    load = generator.uniform(1, 7, 9)
    ours, theirs = 2.0 * load, 5.0 * load
    assert paired_ratio(theirs, ours) == pytest.approx(2.5)
    noisy = theirs * generator.uniform(0.9, 1.1, 9)
    assert paired_ratio(noisy, ours) == sorted(a / b for a, b in zip(noisy, ours))[4]


def test_a_row_from_seconds():
    products = Products(jnp.dtype("float32"), size=8, count=5)
    assert products.flops == 2 * 8**3 * 5
    seconds = {
        "sft": np.array([2.0, 4.0, 8.0]),
        "simpo": np.array([3.0, 4.4, 8.0]),
        products.name: np.array([1.0, 2.0, 1.0]),
    }
    work = Work(images=16, samples=32, tokens=1000, sequence_tokens=1900, slots=1250, flops=3 * products.flops)
    row = row_of("simpo", work, seconds, products)
    assert (row["seconds"], row["best_seconds"], row["ratio_to"]) == (4.4, 3.0, "sft")
    assert row["ratio"] == pytest.approx(1.1)
    assert row["samples_per_second"] == pytest.approx(32 / 4.4)
    assert row["tokens_per_second"] == pytest.approx(1000 / 4.4)
    assert row["filled"] == 0.8
    # of each turn: three times the products' work, in so many of their times; all fake devices are one machine
    import jax

    pairs = sorted(3 * b / a for a, b in zip(seconds["simpo"], seconds[products.name]))
    assert row["mfu"] == pytest.approx(pairs[1] / jax.device_count())


def test_what_is_compared_with_what():
    parts = ["base", "x sft", "x grpo", "x prefill", "x distribution", "matmul float32"]
    assert reference_of("x grpo", parts) == reference_of("matmul float32", parts) == "x sft"
    assert reference_of("x distribution", parts) == "x prefill"
    assert reference_of("eval", ["eval", "matmul float32"]) == "eval"


def test_the_machine():
    seconds = Products(jnp.dtype("float32"), size=64, count=2)()
    assert list(seconds) == ["matmul float32"]
    assert seconds["matmul float32"] > 0
    peak, where = peak_memory()
    assert where in ("process", "device")
    assert peak > 2**20
    busy = Neighbours().cores()
    assert busy is None or busy >= 0
