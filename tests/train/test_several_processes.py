"""Several real processes with a device each are one: losses, checkpoints, parameters; and none waits for a dead one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from loopback import Pod
from safetensors.numpy import load_file
from test_loop import make_ground, rows, values

from csp_jax.train.hosts import LOST

STEPS = 5
INTERRUPTED = 9  # what train_child.py leaves with
HEARTBEAT = 10


def start(ground: Path, out: Path, count: int, **changes: Any) -> Pod:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings(ground, out, **changes)))
    return Pod(Path(__file__).parent / "train_child.py", file, out, count)


def settings(ground: Path, out: Path, **changes: Any) -> dict[str, Any]:
    run = {"out": str(out), "steps": STEPS, "checkpoint_every": 2, "progress": False, "heartbeat_seconds": HEARTBEAT}
    base = values(ground, out, batch={"rows": 4, "accumulation": 2}, run=run)
    # A large epsilon: gradients that are zero but for rounding would be blown up (see test_step.py).
    return {**base, "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-3}, **changes}


def assert_same(out: Path, wanted: Path) -> None:
    for found, want in zip(rows(out), rows(wanted), strict=True):
        for name in ("loss", "grad_norm", "simpo", "nll", "pair_accuracy", "margin", "skipped"):
            assert found[name] == pytest.approx(want[name], rel=2e-4, abs=2e-4), (name, found["step"])
    found, want = (load_file(folder / "model" / "model.safetensors") for folder in (out, wanted))
    assert set(found) == set(want)
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)


def samples(out: Path) -> list[int]:
    """Responses that each update trained on, from what was said of the rates; the first update has none."""
    return [round(row["samples_per_second"] * row["seconds"]) for row in rows(out)[1:]]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def alone(ground: Path) -> Path:
    """The run on one device."""
    return start(ground, ground / "alone", 1).finish()


@pytest.mark.slow
def test_two_processes_are_one(ground, alone):
    """Data-parallel over the processes, checkpoints in between."""
    out = start(ground, ground / "two", 2).finish()
    assert_same(out, alone)
    assert samples(out) == samples(out / "hosts" / "1") == samples(alone)  # of all processes, whoever says it
    assert {"2", "4"} & {folder.name for folder in (out / "checkpoints").iterdir()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("count", "parallel"),
    [(4, {"data": 1, "fsdp": 4}), (4, {"data": 2, "fsdp": 2}), (2, {"strategy": "pmap"}), (2, {"fsdp": 2})],
    ids=["fsdp4", "data2fsdp2", "pmap", "fsdp2"],
)
def test_processes_are_one(ground, alone, count, parallel):
    out = ground / "-".join(map(str, [count, *parallel.values()]))
    assert_same(start(ground, out, count, parallel=parallel).finish(), alone)


@pytest.mark.heavy
def test_a_lost_process_ends_the_others_and_comes_back(ground, alone):
    """One of four is killed: the others end with a message; started again, all end where the undisturbed run did."""
    out = ground / "lost"
    pod = start(ground, out, 4, parallel={"data": 2, "fsdp": 2})
    pod.wait_for_step(3)
    pod.processes[2].kill()
    ends = pod.wait()
    assert ends[2] == -signal.SIGKILL
    others = [status for number, status in enumerate(ends) if number != 2]
    assert all(status not in (0, INTERRUPTED) for status in others), ends
    assert LOST in others
    assert "lost another one while waiting for" in pod.said()
    assert not (out / "model").exists()
    assert_same(start(ground, out, 4, parallel={"data": 2, "fsdp": 2}).finish(), alone)


@pytest.mark.heavy
def test_one_told_to_stop_stops_all(ground, alone):
    """SIGTERM to one of two: both save the same step and leave with the status of an interruption; one process
    alone, on a mesh of another size, goes on from there."""
    out = ground / "told"
    run = {"out": str(out), "steps": 40, "progress": False, "heartbeat_seconds": HEARTBEAT}
    pod = start(ground, out, 2, run=run)
    pod.wait_for_step(2)
    pod.processes[1].terminate()
    assert pod.wait() == [INTERRUPTED, INTERRUPTED], pod.said()
    reached = rows(out)[-1]["step"]
    assert f"stopped after step {reached} of 40" in pod.said()
    assert str(reached) in {folder.name for folder in (out / "checkpoints").iterdir()}
    again = start(ground, out, 1, run=run).finish()
    assert [row["step"] for row in rows(again)] == list(range(1, 41))
    undisturbed = ground / "undisturbed"
    assert_same(again, start(ground, undisturbed, 1, run={**run, "out": str(undisturbed)}).finish())
