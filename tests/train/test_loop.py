"""The loop: killed or stopped and run again, it ends where the uninterrupted run does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import tiny_values, write_folder
from train_child import INTERRUPTED

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.models.registry import load_model
from csp_jax.train.loop import train
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

STEPS, EVERY = 24, 4
WORLD = WorldConfig(statistics_scenes=100)


def make_ground(folder: Path) -> Path:
    """A checkpoint folder without weights, and a world of forty scenes."""
    tokenizer = build_tokenizer(WORLD, scenes=20, vocab_size=400)
    write_folder(folder / "checkpoint", tiny_values(vocab_size=400, num_hidden_layers=2), tokenizer)
    build(WORLD, folder / "world", {"train": 40})
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("loop"))


def values(ground: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "seed": 1,
        "model": {"checkpoint": str(ground / "checkpoint"), "random_init": True},
        "data": {
            "shards": str(ground / "world"),
            "recipe": {
                "name": "evidence",
                "items": 2,
                "retention_items": 1,
                "shape": {"prompt": 16, "groups": 4, "length": 120, "targets": 24, "responses": 16},
            },
        },
        "loss": {"name": "simpo"},
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.1},
        "batch": {"rows": 2, "accumulation": 2},
        "run": {"out": str(out), "steps": STEPS, "checkpoint_every": EVERY, "progress": False},
        **changes,
    }


class Child:
    """A training process on one device."""

    def __init__(self, ground: Path, out: Path, *arguments: str):
        self.out = out
        file = out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values(ground, out)))
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "OMP_NUM_THREADS": "1"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(ground / "compiled")
        self.log = out.with_suffix(".log")
        with self.log.open("a") as log:
            script = Path(__file__).parent / "train_child.py"
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(file), *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def finish(self) -> None:
        assert self.wait() == 0, self.log.read_text()[-3000:]

    def wait_for_step(self, step: int) -> None:
        while len(rows(self.out)) < step:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.005)


def rows(out: Path) -> list[dict[str, Any]]:
    """Complete lines of the metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def column(out: Path, name: str) -> list[Any]:
    return [(row["step"], row.get(name)) for row in rows(out)]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(ground: Path) -> Path:
    child = Child(ground, ground / "uninterrupted")
    child.finish()
    return child.out


def assert_same_run(out: Path, wanted: Path) -> None:
    for name in ("loss", "grad_norm", "simpo", "nll", "counts"):
        assert column(out, name) == column(wanted, name), name
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    assert rows(out)[-1]["counts"]
    assert weights(out) == weights(wanted)


@pytest.mark.slow
def test_a_run_writes_what_it_should(uninterrupted, ground):
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) and row["tokens_per_second"] > 0 for row in found)
    assert np.mean([row["loss"] for row in found[-5:]]) < np.mean([row["loss"] for row in found[:5]])
    assert sorted(file.name for file in (uninterrupted / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    load_model(uninterrupted / "model")


@pytest.mark.slow
def test_killed_and_run_again_is_uninterrupted(ground, uninterrupted):
    """SIGKILL right after a checkpoint, and at a random moment: what was being written must not be picked up."""
    out = ground / "killed"
    child = Child(ground, out, str(EVERY))
    assert child.wait() == -signal.SIGKILL, child.log.read_text()[-3000:]
    chance = random.Random()
    step, delay = chance.randint(EVERY + 1, STEPS - 6), chance.uniform(0.0, 0.3)
    print(f"killed {delay:.3f} s after the metrics of step {step}")
    child = Child(ground, out)
    child.wait_for_step(step)
    time.sleep(delay)
    child.process.kill()
    assert child.wait() in (-signal.SIGKILL, 0)
    Child(ground, out).finish()
    assert_same_run(out, uninterrupted)


@pytest.fixture(scope="module")
def stopped(ground: Path) -> Child:
    """A run that was told to stop between two checkpoints."""
    child = Child(ground, ground / "stopped")
    child.wait_for_step(EVERY + 1)
    child.process.terminate()
    assert child.wait() == INTERRUPTED, child.log.read_text()[-3000:]
    return child


@pytest.mark.slow
def test_stopped_and_run_again_is_uninterrupted(ground, uninterrupted, stopped):
    """SIGTERM: the step is finished, the state saved, nothing done twice."""
    reached = rows(stopped.out)[-1]["step"]
    assert EVERY < reached < STEPS
    assert f"stopped after step {reached} of {STEPS}" in stopped.log.read_text()
    assert str(reached) in {file.name for file in (stopped.out / "checkpoints").iterdir()}
    assert not (stopped.out / "model").exists()
    again = ground / "again"
    shutil.copytree(stopped.out, again)
    Child(ground, again).finish()
    assert_same_run(again, uninterrupted)


@pytest.mark.slow
def test_a_finished_run_returns_at_once(ground, uninterrupted, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.name != "config.yaml"}

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a finished run was set up again")

    monkeypatch.setattr("csp_jax.train.loop.Run", refuse)
    config = load_config(TrainConfig, uninterrupted.with_suffix(".yaml"))
    assert train(config) == uninterrupted / "model"
    after = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.name != "config.yaml"}
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "field", "before"),
    [
        ("optimizer.learning_rate=0.01", "optimizer.learning_rate", 0.001),
        ("seed=2", "seed", 1),
        ("loss.name=sft", "loss.name", "simpo"),
        ("data.recipe.shape.groups=5", "data.recipe.shape.groups", 4),
        ("data.recipe.confidence_levels={80: 1.0}", "data.recipe.confidence_levels.80", None),
    ],
)
def test_a_folder_of_another_run_is_refused(ground, uninterrupted, override, field, before):
    config = load_config(TrainConfig, uninterrupted.with_suffix(".yaml"), [override])
    kept = (uninterrupted / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="another configuration") as caught:
        train(config)
    assert (caught.value.file, caught.value.field) == (uninterrupted / "config.yaml", field)
    assert caught.value.value == before
    assert (uninterrupted / "config.yaml").read_bytes() == kept


@pytest.mark.slow
def test_checkpoints_of_another_model_are_refused(ground, stopped):
    """The same configuration, but the checkpoint folder holds another model now."""
    out = ground / "other"
    shutil.copytree(stopped.out, out)
    config = ground / "checkpoint" / "config.json"
    kept = config.read_text()
    wider = json.loads(kept)
    wider["text_config"]["intermediate_size"] = 64
    config.write_text(json.dumps(wider))
    try:
        again = Child(ground, out)
        assert again.wait() == 1
    finally:
        config.write_text(kept)
    assert "choose another run.out" in again.log.read_text()


def test_folders_that_are_not_there_are_named(ground, tmp_path):
    for override, missing in (
        (f"model.checkpoint={tmp_path}/nowhere", tmp_path / "nowhere"),
        (f"data.shards={tmp_path}/nothing", tmp_path / "nothing"),
    ):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(values(ground, tmp_path / "out", batch={"rows": 8})))
        with pytest.raises(UserError, match="no such") as caught:
            train(load_config(TrainConfig, file, [override, f"run.out={tmp_path}/{override[:5]}"]))
        assert str(missing) in str(caught.value.file)


def test_rows_that_do_not_divide_are_refused(ground, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values(ground, tmp_path / "out", batch={"rows": 6})))
    with pytest.raises(UserError, match="multiple of 8") as caught:
        train(load_config(TrainConfig, file))
    assert (caught.value.field, caught.value.value) == ("batch.rows", 6)
