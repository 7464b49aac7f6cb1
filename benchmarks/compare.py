"""Ours and theirs in turns on the same weights, batch and machine; ratios by pairs within a turn.

python benchmarks/compare.py                        everything, 5 turns; build/bench/compare.json
python benchmarks/compare.py simpo --repeats 9      one line of the table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from prepare import HERE, prepare

from csp_jax.bench.clock import paired_ratio

# Of each task: contestants (environment and script), and the sizes of an update or a pass.
OURS = ("csp_jax", "", "with_csp.py")
LINES: dict[str, tuple[list[tuple[str, str, str]], dict[str, int]]] = {
    "sft": (
        [OURS, ("trl", "trl", "with_trl.py"), ("ms-swift", "swift", "with_swift.py"),
         ("torch", "trl", "with_torch.py")],
        {"rows": 8, "accumulation": 2},
    ),
    "simpo": (
        [OURS, ("trl", "trl", "with_trl.py"), ("ms-swift", "swift", "with_swift.py"),
         ("torch", "trl", "with_torch.py")],
        {"rows": 8, "accumulation": 2},
    ),
    "grpo": (
        [OURS, ("trl", "trl", "with_trl.py"), ("ms-swift", "swift", "with_swift.py")],
        {"rows": 2, "accumulation": 2, "samples": 4, "tokens": 8, "rank": 16},
    ),
    "query": (
        [OURS, ("transformers", "trl", "with_transformers.py")],
        {"rows": 16, "accumulation": 1, "tokens": 5},
    ),
    "verbal": (
        [OURS, ("transformers", "trl", "with_transformers.py")],
        {"rows": 8, "accumulation": 1, "tokens": 5},
    ),
    "eval": (
        [OURS, ("transformers", "trl", "with_transformers.py")],
        {"rows": 8, "accumulation": 1, "tokens": 5},
    ),
}  # fmt: skip


class Contestant:
    """A process that takes turns."""

    def __init__(self, name: str, python: Path, script: Path, arguments: list[str], log: Path, threads: int):
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "MODELSCOPE_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"}
        environment |= {"PYTHONPATH": f"{HERE.parent}:{HERE / 'contestants'}"}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def turn(self) -> dict[str, Any]:
        """One update or pass; RuntimeError names the log of a contestant that is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended; see {self._log.name}")
        return json.loads(answer)

    def close(self) -> None:
        """No more turns."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


def run_line(task: str, folder: Path, peers: Path, *, repeats: int, warmup: int, threads: int) -> list[dict[str, Any]]:
    """A row for each contestant of a task that is installed."""
    contestants, sizes = LINES[task]
    running: list[Contestant] = []
    try:
        for name, environment, script in contestants:
            python = peers / environment / "bin" / "python" if environment else Path(sys.executable)
            if not python.exists():
                print(f"{name}: {python} is not there (benchmarks/setup.sh {environment})", file=sys.stderr)
                continue
            options = [f"--{key}={value}" for key, value in {**sizes, "threads": threads}.items()]
            log = folder / f"{task}-{name}.log"
            arguments = [str(folder), task, *options]
            running.append(Contestant(name, python, HERE / "contestants" / script, arguments, log, threads))
        answers: dict[str, list[dict[str, Any]]] = {one.name: [] for one in running}
        for turn in range(warmup + repeats):
            for one in running:
                answers[one.name].append(one.turn())
                print(f"{task} turn {turn - warmup + 1} {one.name}: {answers[one.name][-1]}", file=sys.stderr)
    finally:
        for one in running:
            one.close()
    return rows_of(task, sizes, {name: found[warmup:] for name, found in answers.items()})


def rows_of(task: str, sizes: dict[str, int], answers: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians, and each contestant's time by ours, turn by turn."""
    ours = next(iter(answers))
    updates = sizes["rows"] * sizes["accumulation"] * (sizes.get("samples", 4) if task == "grpo" else 1)
    seconds = {name: [answer["seconds"] for answer in found] for name, found in answers.items()}
    return [
        {
            "task": task,
            "contestant": name,
            "seconds": statistics.median(took),
            "best_seconds": min(took),
            "per_second": updates / statistics.median(took),
            "ratio_to_ours": paired_ratio(np.array(took), np.array(seconds[ours])),
            "peak_bytes": max(answer["peak_bytes"] for answer in answers[name]),
            "cores_busy_elsewhere": statistics.median(answer["cores_busy_elsewhere"] for answer in answers[name]),
            "loss": answers[name][0].get("loss"),
            "all_seconds": took,
        }
        for name, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tasks", nargs="*", choices=[*LINES, []], help="lines of the table; none: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="llava-112")
    parser.add_argument("--prompt", type=int, default=115)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/llava-112"))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/compare.json"))
    given = parser.parse_args()
    prepare(given.folder, given.model, given.prompt, given.peers)
    rows = []
    for task in given.tasks or LINES:
        rows += run_line(
            task, given.folder, given.peers, repeats=given.repeats, warmup=given.warmup, threads=given.threads
        )
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'task':8}{'contestant':18}{'s':>8}{'best s':>9}{'per s':>9}{'x ours':>8}{'GiB':>7}{'others':>8}")
    for row in rows:
        print(
            f"{row['task']:8}{row['contestant']:18}{row['seconds']:8.2f}{row['best_seconds']:9.2f}"
            f"{row['per_second']:9.2f}{row['ratio_to_ours']:8.2f}{row['peak_bytes'] / 2**30:7.2f}"
            f"{row['cores_busy_elsewhere']:8.1f}"
        )


if __name__ == "__main__":
    main()
