"""How a contestant takes its turns: it waits for `go` on its standard input and answers with a line of JSON.

So all contestants are loaded and warm at once, none computes while it is not its turn, and what disturbs the machine
disturbs all of them. Nothing but the standard library at import: this runs in every contestant's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Turns:
    """`wait` for the next turn, then say `done`; whatever else writes to standard output goes to standard error."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start, self._before = 0.0, (0.0, 0.0)

    def wait(self) -> None:
        """Returns at the next `go`; when there are no more turns the process ends here."""
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # trainers would write checkpoints on their way out
        self._start, self._before = time.perf_counter(), self._clocks()

    def done(self, **facts: object) -> None:
        """Seconds since `go`, the process's peak memory, cores that others kept busy, and what else is to be known."""
        seconds = time.perf_counter() - self._start
        busy, own = (now - before for now, before in zip(self._clocks(), self._before))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "peak_bytes": peak, "cores_busy_elsewhere": max(busy - own, 0.0) / seconds}
        print(json.dumps({**answer, **facts}), file=self._answers, flush=True)

    @staticmethod
    def _clocks() -> tuple[float, float]:
        """Busy seconds of all cores (Linux), and this process's own."""
        with open("/proc/stat") as file:
            user, nice, system, _idle, _waiting, *rest = (int(word) for word in file.readline().split()[1:9])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK"), time.process_time()


def arguments() -> argparse.Namespace:
    """What every contestant is told: the prepared folder, the task and its sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("task")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    return parser.parse_args()


def open_hub(given: argparse.Namespace) -> tuple[Path, Any, Any, list[dict[str, Any]]]:
    """The prepared folder, its processor and model in transformers, and its questions, on so many threads."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(given.threads)
    folder = Path(given.folder)
    processor = AutoProcessor.from_pretrained(folder / "hub")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "hub", dtype=torch.float32)
    return folder, processor, model, json.loads((folder / "rows.json").read_text())


def asked(processor: Any, questions: Iterable[str]) -> list[str]:
    """Questions about a picture as their model reads them, up to where the answer begins."""
    parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    turns = [[{"role": "user", "content": part}] for part in parts]
    return [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]


def trainer_turns(turns: Turns, losses: list[float]) -> type:
    """A callback for transformers' trainers: one turn from the end of an update to the end of the next, so that
    reading data, sampling and the optimizer are in it."""
    from transformers import TrainerCallback

    class OneUpdateATurn(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            turns.wait()

        def on_step_end(self, *_: object, **__: object) -> None:
            turns.done(loss=losses[-1] if losses else None)
            turns.wait()

        def on_log(self, _arguments: object, _state: object, _control: object, logs: dict, **__: object) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    return OneUpdateATurn
