"""GRPO over several processes: each asks its own questions; what all of them train on is what one would."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from loopback import Pod
from policy_ground import make_ground, values
from safetensors.numpy import load_file

from csp_jax.policy import share_groups

STEPS = 3
COLD = 0.05
NAMES = ("loss", "grad_norm", "kl", "reward", "reward_std", "zero_spread", "response_tokens", "ended", "rounds")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("hosts"))


def start(ground: Path, name: str, count: int, **changes: Any) -> Pod:
    """Three updates, two to a rollout; it is cold, so that groups are alike and others are sampled in their place."""
    out = ground / name
    settings = values(ground, out, rows=4, rollout={"updates": 2, "rounds": 3, "temperature": COLD}, **changes)
    settings["optimizer"] |= {"learning_rate": 1e-3, "epsilon": 1e-3}  # see test_step.py
    settings["run"] |= {"steps": STEPS, "checkpoint_every": 1, "heartbeat_seconds": 10}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return Pod(Path(__file__).parent / "policy_child.py", file, out, count)


@pytest.fixture(scope="module")
def alone(ground: Path) -> Path:
    return start(ground, "alone", 1).finish()


def assert_same(out: Path, wanted: Path) -> None:
    def rows(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    for found, want in zip(rows(out), rows(wanted), strict=True):
        assert found["counts"] == want["counts"]
        for name in set(NAMES) & set(want):
            assert found[name] == pytest.approx(want[name], rel=2e-4, abs=2e-4), (name, found["step"])
    assert "reward" in rows(wanted)[0]
    assert rows(wanted)[-1]["counts"]["groups_alike"] > 0
    file = Path("model") / "adapter_model.safetensors"
    found, want = (load_file(folder / file) for folder in (out, wanted))
    assert set(found) == set(want)
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_are_one(ground, alone):
    assert_same(start(ground, "two", 2, parallel={"data": 1, "fsdp": 2}).finish(), alone)


@pytest.mark.heavy
@pytest.mark.parametrize("parallel", [{"data": 2, "fsdp": 2}, {"strategy": "pmap"}], ids=["data2fsdp2", "pmap"])
def test_four_processes_are_one(ground, alone, parallel):
    assert_same(start(ground, f"four-{len(parallel)}", 4, parallel=parallel).finish(), alone)


@pytest.mark.heavy
def test_a_rollout_goes_on_after_the_death_of_a_process(ground, alone):
    """It falls between two updates on one rollout; one process goes on and draws all pictures anew."""
    pod = start(ground, "lost", 2)
    pod.wait_for_step(1)
    pod.processes[1].kill()
    assert all(status != 0 for status in pod.wait()), pod.said()
    assert_same(start(ground, "lost", 1).finish(), alone)


def test_groups_stay_where_their_pictures_are():
    """Every group once, each host its own first, none more than its rows; the rest goes where there is room."""
    generator = np.random.default_rng(0)
    for hosts, most in ((1, 6), (2, 3), (4, 2)):
        chosen = generator.choice(24, hosts * most, replace=False)
        places = [(int(number) // 12, int(number) % 12) for number in sorted(chosen)]
        shares = share_groups(places, hosts, most)
        assert sorted(number for share in shares for number in share) == list(range(hosts * most))
        drawn = Counter(row % hosts for _, row in places)
        for host, share in enumerate(shares):
            assert len(share) == most
            own = [number for number in share if places[number][1] % hosts == host]
            assert len(own) == min(drawn[host], most)
            assert own == sorted(own)
    assert share_groups([(0, 1), (0, 3), (0, 5)], 2, 2) == [[2], [0, 1]]
