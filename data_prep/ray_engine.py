"""Where the stages run: on ray's workers, many GPUs and many hosts. This process reads the source and packs.

Every worker runs all stages on whole batches. A worker that is lost is started anew and its batches are sent again;
only what comes back is packed, in the order of the source, so nothing is lost or doubled. Workers read the pictures
themselves: their paths must be the same on every host.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import encode_mask
from data_prep.config import PrepConfig
from data_prep.engine import Clocks
from data_prep.masks import RowRuns
from data_prep.unit import Unit


class Worker:
    """All stages in a process of ray's."""

    def __init__(self, values: dict[str, Any]):
        from data_prep.run import open_stages

        self.stages, self._weights = open_stages(PrepConfig.model_validate(values))

    def about(self) -> tuple[dict[str, Any], int]:
        """The hashes of the weights, and the process."""
        return self._weights, os.getpid()

    def work(self, batch: list[Unit]) -> tuple[list[Unit], dict[str, float]]:
        """The batch after all stages, without what packing does not need; and the seconds of each stage."""
        seconds = {}
        for stage in self.stages:
            start = time.perf_counter()
            stage(batch)
            seconds[stage.name] = time.perf_counter() - start
        for unit in batch:
            _lighten(unit)
        return batch, seconds


def _lighten(unit: Unit) -> None:
    """Pixels stay where they are, masks travel as run lengths."""
    if unit.picture is None:
        return
    used = {index for item in unit.items for index in item.regions}
    for index, region in enumerate(unit.regions):
        region.mask = RowRuns(encode_mask(unit.mask(index))) if index in used else None
    unit.shape, unit.picture, unit.image = unit.size, None, None


class RayEngine:
    """`run.workers` workers on a cluster (`run.address`), or on one that is started on this machine.

    UserError: ray is not installed, the cluster cannot be reached or lacks what the workers need, or a worker's own.
    """

    def __init__(self, config: PrepConfig):
        try:
            import ray
        except ImportError:
            mend = "Install the `prep` extra, or set run.engine=local"
            raise UserError("ray is not installed", field="run.engine", value="ray", mend=mend) from None
        self._ray, self.config = ray, config
        self._started = not ray.is_initialized()
        run = config.run
        if self._started:
            here = {} if run.address else {"num_cpus": max(os.cpu_count() or 1, int(run.workers * run.cpus + 0.999))}
            try:
                ray.init(
                    address=run.address or "local",
                    include_dashboard=False,
                    logging_level="error",
                    log_to_driver=False,
                    **here,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"cannot be reached ({error})", field="run.address", value=run.address) from None
        self._check_resources()
        options = {"num_cpus": run.cpus, "num_gpus": run.gpus, "max_restarts": -1, "max_task_retries": run.retries}
        made = ray.remote(**options)(Worker)
        values = config.model_dump(mode="json")
        self.workers = [made.remote(values) for _ in range(run.workers)]
        self.weights: dict[str, Any] = self._get(self.workers[0].about.remote())[0]

    def _check_resources(self) -> None:
        """Workers that the cluster has no room for would wait without a word."""
        there = self._ray.cluster_resources()
        run = self.config.run
        for name, kind, each in (("cpus", "CPU", run.cpus), ("gpus", "GPU", run.gpus)):
            if run.workers * each > there.get(kind, 0):
                raise UserError(
                    f"{run.workers} workers need {run.workers * each:g}, the cluster has {there.get(kind, 0):g}",
                    field=f"run.{name}",
                    value=each,
                    mend="Use fewer workers, or give each less",
                )

    def pids(self) -> list[int]:
        """The workers' processes."""
        return [self._get(worker.about.remote())[1] for worker in self.workers]

    def run(self, batches: Iterable[list[Unit]], clocks: Clocks) -> Iterator[list[Unit]]:
        """Every batch through a worker, in order; at most `run.queue` batches wait for each worker."""
        under_way: collections.deque[tuple[Any, int]] = collections.deque()
        load = [0] * len(self.workers)
        for batch in batches:
            while min(load) >= self.config.run.queue:
                yield self._finish(under_way, load, clocks)
            idle = load.index(min(load))
            load[idle] += 1
            under_way.append((self.workers[idle].work.remote(batch), idle))
        while under_way:
            yield self._finish(under_way, load, clocks)

    def _finish(self, under_way: collections.deque[tuple[Any, int]], load: list[int], clocks: Clocks) -> list[Unit]:
        reference, worker = under_way.popleft()
        batch, seconds = self._get(reference)
        load[worker] -= 1
        for name, taken in seconds.items():
            clocks[name].seconds += taken
            clocks[name].units += len(batch)
        return batch

    def _get(self, reference: Any) -> Any:
        """What a worker returned; its own mistakes come out as they were raised."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayActorError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(
                f"a worker was lost {self.config.run.retries + 1} times at the same batch ({error})",
                field="run.engine",
                value="ray",
                mend="Look at its memory (batch, segment.model.prompts) and run the same command again",
            ) from None

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if self._started:
            self._ray.shutdown()
            return
        for worker in self.workers:
            self._ray.kill(worker)
