"""What a run says while it runs: progress bar, JSONL, TensorBoard and Weights & Biases, one step late."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from csp_jax.train.rates import Rates
from csp_jax.train.weights_and_biases import Board

WORK = ("tokens", "images", "samples")  # of an update; see `step.batch_sizes`


class Telemetry:
    """Writes `metrics.jsonl` and TensorBoard events; lines past the step it resumes from are dropped.

    A line holds the metrics of its step, and rates over the steps since the line before (see `Rates`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        total: int,
        start: int,
        title: str,
        progress: bool,
        log_every: int,
        rates: Rates,
        board: Board | None = None,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "metrics.jsonl"
        self.rates, self._counts, self._wandb = rates, Counter[str](), board
        self._truncate(start)
        self._lines = self.file.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)
        self.log_every, self.total = log_every, total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not progress,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, loss="-")

    def _truncate(self, start: int) -> None:
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line torn by a kill; the step is run again
        temporary = self.file.with_suffix(".partial")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.rename(self.file)
        if kept:
            self._counts.update(json.loads(kept[-1]).get("counts", {}))

    def __enter__(self) -> Telemetry:
        self._bar.start()
        return self

    def log(self, step: int, metrics: Mapping[str, Any], counts: Counter[str], flops: float | None = None) -> None:
        """Record a finished step; `flops`: its useful work on all devices, where that is counted."""
        self._counts.update(counts)
        values = {name: float(value) for name, value in metrics.items()}
        values["padding"] = 1 - values["tokens"] / max(values.pop("slots"), 1)
        work = {name: values.pop(name) for name in WORK}
        self.rates.done(**work, flops=flops or 0.0)
        self._bar.update(self._task, completed=step, loss=f"{values['loss']:.4f}")
        if step % self.log_every and step != self.total:
            return
        values |= self.rates.line()
        row = {"step": step, **values, **({"counts": dict(self._counts)} if self._counts else {})}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._lines.close()
        self._board.close()
        if self._wandb:
            self._wandb.close()
