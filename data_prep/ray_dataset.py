"""A run as one data set of Ray Data: a task reads the source bit by bit, actors run the stages.

Every block has one row, and every row holds one batch, pickled: batches stay what they are in one process whatever
ray does with rows and blocks. What goes wrong travels in a row too, so that it comes out at its place in the order,
as it was raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import ray
import ray.data

from csp_jax.errors import UserError
from csp_jax.records import encode_mask
from data_prep.config import PrepConfig, RunConfig
from data_prep.masks import RowRuns
from data_prep.unit import Stage, Unit

COLUMN = "parcel"


@dataclass
class Parcel:
    """One batch on its way, or what ended the way; `number` counts the batches that are to be done."""

    number: int
    batch: list[Unit] = field(default_factory=list)
    end: bool = False  # there is no further batch
    error: Exception | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of every stage
    process: int = 0  # that ran the stages

    def table(self) -> pyarrow.Table:
        """As a block of one row."""
        try:
            data = pickle.dumps(self, pickle.HIGHEST_PROTOCOL)
            if self.error is not None:
                pickle.loads(data)
        except Exception:
            if self.error is None:
                raise
            text = "".join(traceback.format_exception(self.error))
            data = pickle.dumps(Parcel(self.number, error=RuntimeError(text)), pickle.HIGHEST_PROTOCOL)
        return pyarrow.table({COLUMN: pyarrow.array([data], pyarrow.large_binary())})


def parcel_of(table: pyarrow.Table) -> Parcel:
    """What a block of one row holds."""
    (value,) = table.column(COLUMN)
    return pickle.loads(value.as_buffer())


class Gate:
    """Lets the reader go only so far ahead of what is packed, however small the batches are, and counts beginnings."""

    def __init__(self, ahead: int):
        self._limit, self._ahead = ahead, ahead
        self._moved = asyncio.Condition()
        self._begun: Counter[int] = Counter()  # how often, of each batch that is not packed

    async def begin(self, number: int) -> int:
        """How often work at this batch began, this time included."""
        self._begun[number] += 1
        return self._begun[number]

    async def limit(self, number: int) -> int:
        """The first batch that must not be read yet; waits until that is beyond `number`."""
        async with self._moved:
            await self._moved.wait_for(lambda: number < self._limit)
        return self._limit

    async def packed(self, count: int) -> None:
        """So many batches are packed."""
        async with self._moved:
            self._limit = count + self._ahead
            self._begun.pop(count - 1, None)
            self._moved.notify_all()


class Reader:
    """The source's batches as blocks, one after another; run again after a loss it gives the same ones."""

    def __init__(self, batches: Iterable[list[Unit]], gate: Any):
        self.batches, self.gate, self._here = batches, gate, os.getcwd()

    def __call__(self) -> Iterator[pyarrow.Table]:
        go_to(self._here)
        limit = 0
        for number in itertools.count():
            try:
                if number == 0:
                    stream = iter(self.batches)
                if number >= limit:
                    limit = ray.get(self.gate.limit.remote(number))
                batch = next(stream, None)
            except Exception as error:
                yield Parcel(number, error=error).table()
                return
            if batch is None:
                yield Parcel(number, end=True).table()
                return
            yield Parcel(number, batch).table()


class Batches(ray.data.Datasource):
    """One read task on this machine: the source's files need not be anywhere else."""

    def __init__(self, reader: Reader):
        super().__init__()
        self._reader = reader

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        from ray.data.block import BlockMetadata

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(self._reader, unknown)]


class Worker:
    """All stages in a process of ray's, for one batch after another."""

    def __init__(self, gate: Any, here: str, values: dict[str, Any], weights: dict[str, Any]):
        from data_prep.run import open_stages

        go_to(here)
        self._gate, self._tries = gate, 1 + values["run"]["retries"]
        self._stages: list[Stage] = []
        self._failed: Exception | None = None
        try:
            self._stages, found = open_stages(PrepConfig.model_validate(values))
            if found != weights:
                raise UserError(
                    f"the weights on {os.uname().nodename} are not those of the other hosts",
                    field="run.address",
                    mend="Give every host the same files",
                )
        except Exception as error:
            self._failed = error

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """The batch after all stages, without what packing does not need; and the seconds of each stage."""
        parcel = parcel_of(table)
        parcel.process = os.getpid()
        if parcel.error or parcel.end:
            return table
        try:
            if self._failed:
                raise self._failed
            self._begin(parcel.number)
            for stage in self._stages:
                start = time.perf_counter()
                stage(parcel.batch)
                parcel.seconds[stage.name] = time.perf_counter() - start
            for unit in parcel.batch:
                _lighten(unit)
            return parcel.table()
        except Exception as error:
            return Parcel(parcel.number, error=error, process=parcel.process).table()

    def _begin(self, number: int) -> None:
        """UserError when too many workers were lost at this batch; what it takes to reach one does not count."""
        if ray.get(self._gate.begin.remote(number)) > self._tries:
            raise UserError(
                f"a worker was lost {self._tries} times at the same batch",
                field="run.retries",
                value=self._tries - 1,
                mend="Look at its memory (batch, segment.model.prompts) and run the same command again",
            )


def _lighten(unit: Unit) -> None:
    """Pixels stay where they are, masks travel as run lengths."""
    if unit.picture is None:
        return
    used = {index for item in unit.items for index in item.regions}
    for index, region in enumerate(unit.regions):
        region.mask = RowRuns(encode_mask(unit.mask(index))) if index in used else None
    unit.shape, unit.picture, unit.image = unit.size, None, None


def go_to(folder: str) -> None:
    """Relative paths mean what they mean where the command was started, if the host has that folder."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def weights_of(here: str, values: dict[str, Any]) -> dict[str, Any]:
    """The hashes of what the stages run, on a machine that has room for them."""
    from data_prep.run import open_stages

    go_to(here)
    return open_stages(PrepConfig.model_validate(values))[1]


def dataset_of(reader: Reader, run: RunConfig, values: dict[str, Any], weights: dict[str, Any]) -> ray.data.Dataset:
    """The data set whose rows are the batches after all stages, in order; nothing runs before it is read."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: every row is a block and leaves at once
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        # It takes no processor from the workers; that also keeps ray from fusing it with them into one actor.
        rows = ray.data.read_datasource(Batches(reader), num_cpus=0, override_num_blocks=1)
        return rows.map_batches(
            Worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=run.workers, max_tasks_in_flight_per_actor=run.queue),
            fn_constructor_args=(reader.gate, os.getcwd(), values, weights),
            num_cpus=run.cpus,
            num_gpus=run.gpus,
            max_restarts=-1,
            max_task_retries=-1,  # while a lost host is not known to be lost, every call to it is a try
        )
