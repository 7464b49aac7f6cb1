"""A GRPO run that is killed and run again ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from policy_ground import make_ground, values

STEPS = 6
NAMES = ("loss", "grad_norm", "kl", "reward", "zero_spread", "response_tokens", "counts")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("resume"))


def start(ground: Path, name: str, *arguments: str, **changes: Any) -> int:
    """One device, one process; its status."""
    file = ground / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values(ground, ground / name, rows=2, **changes)))
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "OMP_NUM_THREADS": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ground / "compiled")
    script = Path(__file__).parent / "policy_child.py"
    run = subprocess.run([sys.executable, str(script), str(file), *arguments], env=environment, timeout=900)
    return run.returncode


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_killed_and_run_again_is_uninterrupted(ground, lora):
    """The checkpoint falls between two updates on one rollout, whose policy is gone when the run goes on."""
    changes = {"lora": lora, "rollout": {"updates": 2}}
    kind = "adapter" if lora else "full"
    assert start(ground, f"{kind}-whole", **changes) == 0
    assert start(ground, f"{kind}-killed", "3", **changes) == -signal.SIGKILL
    assert not (ground / f"{kind}-killed" / "model").exists()
    assert start(ground, f"{kind}-killed", **changes) == 0
    whole, killed = ground / f"{kind}-whole", ground / f"{kind}-killed"
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    for name in NAMES:
        assert [row.get(name) for row in rows(killed)] == [row.get(name) for row in rows(whole)], name
    assert rows(whole)[1]["kl"] > 0  # the policy had moved
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (killed / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
