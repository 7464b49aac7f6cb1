"""How cost grows: what is measured, and that logits exist for what is scored alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_ground import PROMPT, SETTINGS, config, make_ground

from csp_jax.bench.growth import run_sizes, vocabulary_row, window_of
from csp_jax.bench.work import window_work
from csp_jax.train.loop import Run


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("bench"))


def test_windows_are_full(ground):
    work = window_work(window_of(Run(config(ground, "grpo")), responses=4, tokens=3))
    assert work.samples == SETTINGS.rows * 4
    assert work.tokens == work.slots == SETTINGS.rows * (PROMPT + 4 * (3 - 1))
    assert work.sequence_tokens == SETTINGS.rows * 4 * (PROMPT + 3)


@pytest.mark.slow
def test_rows_of_sizes(ground):
    said: list[str] = []
    rows = run_sizes(config(ground, "grpo"), [("responses", 2, 2), ("tokens", 2, 4)], 2, said.append)
    assert [(row["series"], row["responses"], row["tokens"]) for row in rows] == [("responses", 2, 2), ("tokens", 2, 4)]
    assert [row["behind_the_prompt"] for row in rows] == [4, 8]
    for row in rows:
        assert row["fitted_seconds"] == pytest.approx(row["seconds"])  # a line through two points
        assert 0 < row["best_seconds"] <= row["seconds"]
        assert 0 < row["temporary_bytes"] < row["program_bytes"]
    assert len(said) == 4


@pytest.mark.slow
def test_no_logits_of_what_is_not_scored(ground, tmp_path):
    """Another word costs a few numbers for each scored token, not one for each token of the row."""
    samples, tokens, rows = 2, 2, 8  # rows of each of eight devices
    settings = (f"rollout.samples={samples}", f"rollout.max_tokens={tokens}", f"batch.rows={8 * rows}")
    few, words = config(ground, "grpo", *settings), np.array([1000, 9000])
    held = [vocabulary_row(few, ground / "checkpoint", tmp_path, int(n))["temporary_bytes"] for n in words]
    slope = np.diff(held)[0] / np.diff(words)[0]
    assert 4 * rows * samples * tokens <= slope < 4 * rows * PROMPT


@pytest.mark.slow
def test_small_chunks_of_the_head_keep_memory_flat_in_the_vocabulary(ground, tmp_path):
    slopes = []
    for chunk in (1024, 8):
        few = config(ground, "grpo", "rollout.samples=8", "batch.rows=16", f"model.head_chunk={chunk}")
        held = [vocabulary_row(few, ground / "checkpoint", tmp_path, n)["temporary_bytes"] for n in (1000, 9000)]
        slopes.append((held[1] - held[0]) / 8000)
    assert slopes[1] < 4 * 8 * 4  # bytes a word: of a chunk's eight slots, a few times
    assert slopes[0] > 2 * slopes[1]
