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

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file
from tiny import SLOTS, tiny_model, tiny_values, write_folder
from train_child import INTERRUPTED
from typer.testing import CliRunner

from csp_jax.cli import app
from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.models.hub import flat_paths
from csp_jax.models.lora import LoraParam, adapted
from csp_jax.models.registry import load_model, save_model
from csp_jax.plan.program import step_program
from csp_jax.sharding import make_mesh
from csp_jax.train.loop import train
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

STEPS, EVERY = 24, 4
PEAK = 0.5  # TFLOP/s, of a device as the uninterrupted run is told
WORLD = WorldConfig(statistics_scenes=100)


def make_ground(folder: Path) -> Path:
    """A checkpoint folder, and a world of forty scenes."""
    tokenizer = build_tokenizer(WORLD, scenes=20, vocab_size=400)
    write_folder(folder / "checkpoint", tiny_values(vocab_size=400, num_hidden_layers=2), tokenizer)
    save_model(folder / "checkpoint", tiny_model(vocab_size=400, num_hidden_layers=2))
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

    def __init__(self, ground: Path, out: Path, *arguments: str, **changes: Any):
        self.out = out
        file = out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values(ground, out, **changes)))
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
        return self.process.wait(timeout=900)

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
    """With all that may be measured: the runs that are held against it are without."""
    out = ground / "uninterrupted"
    run = {**values(ground, out)["run"], "peak_tflops": PEAK, "profile": {"start": 5, "steps": 2}}
    child = Child(ground, out, run=run)
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
    assert all(np.isfinite(row["loss"]) for row in found)
    assert np.mean([row["loss"] for row in found[-5:]]) < np.mean([row["loss"] for row in found[:5]])
    assert sorted(file.name for file in (uninterrupted / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    load_model(uninterrupted / "model")


@pytest.mark.slow
def test_a_run_says_how_fast_it_goes(uninterrupted):
    """The update that compiles has a time and no rate; work over time is what was read, and what `csp plan` counts."""
    found = rows(uninterrupted)
    assert "first_seconds" in found[0]
    assert not [name for name in found[0] if name.endswith("_per_second") or name == "mfu"]
    config = load_config(TrainConfig, uninterrupted / "config.yaml")
    program = step_program(config, Path(config.model.checkpoint), make_mesh(config.parallel, jax.devices()[:1]))
    for row in found[1:]:
        images, samples = (row[f"{name}_per_second"] * row["seconds"] for name in ("images", "samples"))
        assert [images, samples] == pytest.approx([round(images), round(samples)])
        assert 1 <= round(images) <= 4
        assert round(samples) > round(images)
        assert row["tokens_per_second"] * row["seconds"] > 2 * SLOTS * images  # slots, words, and what hangs from them
        assert 0 <= row["data_seconds"] <= row["seconds"]
        assert row["mfu"] * row["seconds"] * PEAK * 1e12 == pytest.approx(program.useful_flops())
    assert len(list((uninterrupted / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))) == 1


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


@pytest.mark.heavy
def test_killed_ten_times_is_uninterrupted(ground, uninterrupted):
    """SIGKILL at ten random moments, wherever they fall: starting, stepping, writing a checkpoint, exporting."""
    out, chance = ground / "ten", random.Random()
    seconds = 0.0
    for number in range(10):
        child = Child(ground, out)
        if number == 0:
            start = time.monotonic()
            child.wait_for_step(1)
            seconds = time.monotonic() - start  # about what it takes to begin
        delay = chance.uniform(0.0, 1.0 if number == 0 else 1.5 * seconds)
        time.sleep(delay)
        child.process.kill()
        print(f"killed {delay:.3f} s after the start, {len(rows(out))} steps done: status {child.wait()}")
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
def test_the_folder_says_how_the_run_is_laid_out(uninterrupted):
    """One device holds everything: float32 parameters, and two moments of what the model reads."""
    plan = json.loads((uninterrupted / "plan.json").read_text())
    whole = sum(array.size for array in load_file(uninterrupted / "model" / "model.safetensors").values())
    model = load_model(uninterrupted / "model")
    paths = flat_paths(nnx.state(model)).items()
    unused = sum(leaf.size for path, leaf in paths if path.startswith(tuple(model.unused)))
    assert plan["parameters"] == whole
    assert plan["parameters_trained"] == whole - unused
    assert plan["bytes_parameters"] == 4 * whole
    assert 0 <= plan["bytes_optimizer"] - 8 * (whole - unused) < 100  # and its counters
    assert (plan["devices"], plan["mesh"]) == (1, {"data": 1, "fsdp": 1, "tensor": 1})
    assert plan["batch"] == {"rows": 2, "accumulation": 2}


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


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora_changes(ground: Path, out: Path, **lora: Any) -> dict[str, Any]:
    """Nine steps of an adapter with dropout on the ground's weights."""
    adapter = {"rank": 3, "alpha": 6.0, "dropout": 0.2, "targets": [r"decoder\.", "projector"], **lora}
    run = {"out": str(out), "steps": 9, "checkpoint_every": 3, "progress": False}
    return {"model": {"checkpoint": str(ground / "checkpoint"), "lora": adapter}, "loss": {"name": "sft"}, "run": run}


def lora_child(ground: Path, name: str, *arguments: str, **lora: Any) -> Child:
    return Child(ground, ground / name, *arguments, **lora_changes(ground, ground / name, **lora))


def adapter_files(out: Path) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return {name: (out / "model" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def lora_run(ground: Path) -> Path:
    child = lora_child(ground, "lora")
    child.finish()
    return child.out


@pytest.mark.slow
def test_a_run_of_an_adapter_keeps_its_base_elsewhere(ground, lora_run):
    """The folder holds the adapter and what else a model needs; checkpoints hold no base; loading finds it."""
    assert sorted(file.name for file in (lora_run / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "tokenizer.json",
    ]
    model, base = load_model(lora_run / "model"), load_model(ground / "checkpoint")
    assert len(list(adapted(model))) == 16
    assert all(np.any(layer.lora_b[...]) for _, layer in adapted(model))
    mine = flat_paths(nnx.state(model))
    for name, leaf in flat_paths(nnx.state(base)).items():
        np.testing.assert_array_equal(mine[name].get_value(), leaf.get_value(), err_msg=name)
    with ocp.StandardCheckpointer() as checkpointer:
        held = checkpointer.metadata(lora_run / "checkpoints" / "9" / "state").item_metadata
    sizes = {name: int(np.prod(value.shape)) for name, value in held.items()}
    adapter = sum(leaf.size for leaf in jax.tree.leaves(nnx.variables(model, LoraParam)))
    assert not [name for name in sizes if name.startswith(".frozen")]
    assert sum(sizes.values()) < 3 * adapter + 10  # the adapter, two moments, counters


@pytest.mark.slow
def test_a_killed_run_of_an_adapter_is_uninterrupted(ground, lora_run):
    """Dropout included, bit for bit."""
    child = lora_child(ground, "lora-killed", "3")
    assert child.wait() == -signal.SIGKILL, child.log.read_text()[-3000:]
    again = lora_child(ground, "lora-killed")
    again.finish()
    assert column(again.out, "loss") == column(lora_run, "loss")
    assert adapter_files(again.out) == adapter_files(lora_run)


@pytest.mark.slow
def test_another_base_is_noticed_when_a_run_goes_on(ground):
    child = lora_child(ground, "lora-moved", "3")
    assert child.wait() == -signal.SIGKILL, child.log.read_text()[-3000:]
    file = ground / "checkpoint" / "model.safetensors"
    kept = file.read_bytes()
    save_model(ground / "checkpoint", tiny_model(seed=9, vocab_size=400, num_hidden_layers=2))
    try:
        again = lora_child(ground, "lora-moved")
        assert again.wait() == 1
    finally:
        file.write_bytes(kept)
    assert "the base is another one" in again.log.read_text()


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_on_another_backbone(ground, lora_run, tmp_path):
    """PEFT's fields, rank and targets are those of the folder; the new run's adapter names its own base."""
    other = ground / "other-base"
    if not other.exists():
        shutil.copytree(ground / "checkpoint", other)
        save_model(other, tiny_model(seed=9, vocab_size=400, num_hidden_layers=2))
    changes = lora_changes(ground, ground / "lora-on", adapter=str(lora_run / "model"), rank=77)
    changes["model"]["checkpoint"] = str(other)
    child = Child(ground, ground / "lora-on", **changes)
    child.finish()
    config = json.loads((child.out / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(other))
    before, after = (load_file(out / "model" / "adapter_model.safetensors") for out in (lora_run, child.out))
    assert {name: a.shape for name, a in before.items()} == {name: a.shape for name, a in after.items()}
    assert any(np.any(before[name] != after[name]) for name in before)


@pytest.mark.slow
def test_export_and_import_merge_an_adapter(ground, lora_run, tmp_path):
    """On its own base and on another one; what is written is a plain checkpoint."""
    run = CliRunner().invoke
    assert run(app, ["export", str(lora_run / "model"), str(tmp_path / "own")]).exit_code == 0
    options = ["--adapter", str(lora_run / "model")]
    assert run(app, ["export", str(ground / "checkpoint"), str(tmp_path / "same"), *options]).exit_code == 0
    assert run(app, ["import", str(lora_run / "model"), str(tmp_path / "ours")]).exit_code == 0
    assert not list(tmp_path.glob("*/adapter_config.json"))
    own, base = load_file(tmp_path / "own/model.safetensors"), load_file(ground / "checkpoint/model.safetensors")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (tmp_path / "own/model.safetensors").read_bytes()
    changed = {name for name, array in own.items() if np.any(array != base[name])}
    assert len(changed) == 16
    assert {name.split(".")[0] for name in changed} == {"language_model", "multi_modal_projector"}
    ours = flat_paths(nnx.state(load_model(tmp_path / "ours")))
    for name, leaf in flat_paths(nnx.state(load_model(tmp_path / "own"))).items():
        np.testing.assert_array_equal(ours[name].get_value(), leaf.get_value())


def test_an_adapter_of_random_weights_is_refused(ground, tmp_path):
    with pytest.raises(UserError, match="exclude each other") as caught:
        load_config(TrainConfig, None, ["model.random_init=true", "model.lora={}"])
    assert caught.value.field == "model"
    for setting, field in (("rank=0", "rank"), ("dropout=1.0", "dropout"), ("alpha=-1", "alpha"), ("rnak=3", "rnak")):
        with pytest.raises(UserError) as caught:
            load_config(TrainConfig, None, [f"model.lora.{setting}"])
        assert caught.value.field == f"model.lora.{field}"
