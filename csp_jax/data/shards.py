"""Reading data sets: random access to records, the training stream of one host, and evaluation batches.

Position p of the training stream means the same record and random numbers however many hosts, workers or
restarts there are: host h of H takes positions h, h + H, ... of one stream that runs through the epochs.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from csp_jax.errors import UserError
from csp_jax.manifest import open_shard
from csp_jax.records import Record, decode, read_manifest

if TYPE_CHECKING:
    import grain

_MAX_OPEN_SHARDS = 256
_log = logging.getLogger(__name__)


class ShardSource:
    """The records of one split by index. Opens shards when needed; may be pickled and shared by threads.

    UserError names the file: no such directory or split, an interrupted write, another schema version, or a
    shard that is missing, cut or corrupt.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory, self.split = Path(directory), split
        manifest = read_manifest(self.directory)
        self.dataset = manifest.dataset
        self.metadata = manifest.split(split).metadata
        self._shards = manifest.split(split).shards
        self._ends = list(itertools.accumulate(shard.records for shard in self._shards))
        self._open_nothing()

    def _open_nothing(self) -> None:
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        place = index - (self._ends[number] - shard.records)
        try:
            return decode(self._reader(number).read([place])[0])
        except (RuntimeError, IndexError) as error:
            problem = str(error)
        except UserError as error:
            if error.file is not None:
                raise
            problem = error.problem
        raise UserError(
            f"record {place} of the shard cannot be read: {problem}",
            file=self.directory / shard.file,
            mend="Copy the file again or write the data set again",
        )

    def _reader(self, number: int) -> ArrayRecordReader:
        with self._lock:
            if number not in self._readers:
                self._readers[number] = open_shard(self.directory, self._shards[number])
                if len(self._readers) > _MAX_OPEN_SHARDS:
                    # Not closed here: another thread may be reading it. The last reference closes it.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return self._readers[number]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_nothing()

    def __repr__(self) -> str:
        return f"ShardSource({str(self.directory)!r}, {self.split!r}, records={len(self)})"


@dataclasses.dataclass(frozen=True)
class _Transform:
    """Calls `function(record, rng)` with random numbers that depend on the seed and the position alone."""

    function: Callable[[Record, np.random.Generator], Any]
    seed: int

    def __call__(self, position: int, record: Record) -> Any:
        result = self.function(record, np.random.default_rng((self.seed, position)))
        if result is None:  # Grain would drop it without a word
            raise ValueError(f"the transform returned None for record {record.id!r}")
        return result


def training_batches(records: int, *, batch_size: int, host_count: int, repeat: int | None = 1) -> int | None:
    """How many batches each host's `record_dataset` yields, None without end.

    Records that do not fill a batch on every host are left out, at the end of the last epoch only.
    """
    return None if repeat is None else records * repeat // (batch_size * host_count)


def record_stream(
    source: ShardSource,
    *,
    seed: int,
    shuffle: bool = True,
    repeat: int | None = None,
    transform: Callable[[Record, np.random.Generator], Any] | None = None,
) -> Any:
    """What a training draws, by position, as a Grain map data set: `transform(record, rng)`.

    A fresh shuffle every epoch (from `seed`), `repeat` epochs (None: without end).
    """
    import grain

    stream: Any = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        stream = stream.shuffle()
    stream = stream.repeat(repeat)
    return stream if transform is None else stream.map_with_index(_Transform(transform, seed))


def record_dataset(
    source: ShardSource,
    *,
    batch_size: int,
    seed: int,
    host_index: int = 0,
    host_count: int = 1,
    shuffle: bool = True,
    repeat: int | None = None,
    num_workers: int = 0,
    transform: Callable[[Record, np.random.Generator], Any] | None = None,
    collate: Callable[[list[Any]], Any] = list,
    read_threads: int = 2,
    buffered_batches: int = 4,
) -> grain.IterDataset[Any]:
    """This host's training batches: `collate([...])` of `batch_size` positions of `record_stream` each.

    Of a host, item i of all its batches together is position i x host_count + host_index of the stream. `num_workers`
    processes (0: threads only). `transform` and `collate` must be picklable; `transform` must not return None.
    Every record comes exactly once an epoch over all hosts; with a finite `repeat` the last records that do
    not fill a batch on every host are left out and logged. The same batches come out for any `num_workers`;
    the batches number s of all hosts hold the same records for any `host_count` with the same global batch.

    The iterator has `get_state` and `set_state` (for the same `num_workers`) and goes into
    `grain.checkpoint.CheckpointSave` and `CheckpointRestore`; `close()` ends its workers, which are spawned:
    a script that asks for them needs the `if __name__ == "__main__":` guard.
    UserError: host_index or repeat out of range, fewer records than one batch over all hosts.
    """
    import grain

    _check_hosts(host_index, host_count, batch_size)
    if repeat is not None and repeat < 1:
        raise UserError("use at least 1 epoch, or none for no end", field="repeat", value=repeat)
    stream = record_stream(source, seed=seed, shuffle=shuffle, repeat=repeat, transform=transform)
    batches = training_batches(len(source), batch_size=batch_size, host_count=host_count, repeat=repeat)
    if batches is not None:
        used = batches * batch_size * host_count
        if used == 0:
            raise UserError(
                f"{len(stream)} records do not fill one batch of {batch_size} on {host_count} hosts",
                file=source.directory,
                field="batch_size",
                value=batch_size,
                mend="Use a smaller batch or more epochs",
            )
        if used < len(stream):
            _log.info("%s: the last %d of %d records are left out", source, len(stream) - used, len(stream))
        stream = stream[:used]
    # Batches are made before the stream is dealt out to workers, so that workers cannot change them.
    stream = stream[host_index::host_count].batch(batch_size, drop_remainder=True, batch_fn=collate)
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=buffered_batches)
    dataset = stream.to_iter_dataset(options)
    if num_workers == 0:
        return dataset
    _parse_no_flags()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))


def _check_hosts(host_index: int, host_count: int, batch_size: int) -> None:
    if not 0 <= host_index < host_count:
        raise UserError(f"use 0 to {host_count - 1}", field="host_index", value=host_index)
    if batch_size < 1:
        raise UserError("use at least 1", field="batch_size", value=batch_size)


def _parse_no_flags() -> None:
    """Grain's workers copy absl's flags and refuse to start unless those were parsed; we have none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
