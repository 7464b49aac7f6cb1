"""Writes one split of a data set, as bytes: shards that appear all at once and can be resumed.

What the bytes mean is up to `csp_jax/records.py`; which files a directory has, to `csp_jax/manifest.py`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from array_record.python.array_record_module import ArrayRecordWriter

from csp_jax.errors import UserError, disk_is_full
from csp_jax.manifest import (
    DATASET_INFO,
    FEATURES,
    MANIFEST,
    Manifest,
    Shard,
    Split,
    dataset_info_text,
    incomplete_directory,
    load_manifest,
    locked,
    manifest_text,
    open_shard,
    published_splits,
    sha256_of,
    shard_name,
    sync,
    write_synced,
)


class SplitWriter(abc.ABC):
    """Writes shards to `.incomplete-SPLIT/`, each durable and checksummed when full; `finish` publishes them.

    An interrupted write is cleaned up by the next one, or continued by it: `resume=True` keeps the shards
    that were completed (`completed`, `completed_bytes()`); the caller goes on with what follows them.
    `metadata` (anything JSON can hold) is kept in the manifest and may be filled until the end.
    UserError: the split exists already (with `overwrite=True` it is replaced once the new one is whole), the
    directory holds another data set or schema version, another process writes the split, the disk is full.
    """

    schema_version: str

    def __init__(
        self,
        directory: str | Path,
        *,
        dataset: str,
        split: str,
        records_per_shard: int = 1024,
        metadata: dict[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ):
        for name, value, pattern in (
            ("dataset", dataset, "[a-z][a-z0-9_]*"),
            ("split", split, "[A-Za-z]\\w*"),
        ):
            if not re.fullmatch(pattern, value, re.ASCII):
                raise UserError("use letters, digits and _ (a data set: lower case)", field=name, value=value)
        if records_per_shard < 1:
            raise UserError("use at least 1", field="records_per_shard", value=records_per_shard)
        self.directory, self.dataset, self.split = Path(directory), dataset, split
        self.records_per_shard, self.metadata, self.resume = records_per_shard, dict(metadata or {}), resume
        self._work = incomplete_directory(self.directory, split)
        self._shards: list[Shard] = []
        self._writer: ArrayRecordWriter | None = None
        self._records = self._items = 0
        self._check_existing(overwrite)
        self._lock = self._take_lock()
        with self._disk_errors():
            self._take_over()

    @abc.abstractmethod
    def features_text(self) -> str:
        """The text of features.json."""

    def _check_existing(self, overwrite: bool) -> None:
        path = self.directory / MANIFEST
        if not path.exists():
            return
        existing = load_manifest(path)
        elsewhere = "Write into another directory"
        if existing.dataset != self.dataset:
            problem = f"the directory holds data set {existing.dataset!r}, not {self.dataset!r}"
            raise UserError(problem, file=path, mend=elsewhere)
        if existing.schema_version != self.schema_version:
            problem = f"the directory has schema version {existing.schema_version}, not {self.schema_version}"
            raise UserError(problem, file=path, field="schema_version", mend=elsewhere)
        if self.split in published_splits(self.directory) and not overwrite:
            mend = f"{elsewhere}, or ask for it to be overwritten"
            problem = "the split exists already"
            raise UserError(problem, file=self.directory, field="split", value=self.split, mend=mend)

    def _take_lock(self) -> TextIO:
        """Hold the split for this process; the system frees it when the process dies."""
        with self._disk_errors():
            self._work.mkdir(parents=True, exist_ok=True)
            lock = (self._work / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            problem = "another process is writing this split"
            raise UserError(problem, file=self.directory, field="split", value=self.split) from error
        return lock

    def _take_over(self) -> None:
        """Keep the unbroken row of completed shards (with resume); remove all else of an earlier write."""
        keep = {"lock"}
        while self.resume:
            stem = f"{len(self._shards):05d}"
            note, path = self._work / f"{stem}.json", self._work / f"{stem}.array_record"
            if not (note.exists() and path.exists()):
                break
            raw = json.loads(note.read_text(encoding="utf-8"))
            if raw["schema_version"] != self.schema_version:
                break
            self._shards.append(Shard(**raw["shard"]))
            keep |= {note.name, path.name}
        for path in self._work.iterdir():
            if path.name not in keep:
                path.unlink()

    @property
    def completed(self) -> tuple[Shard, ...]:
        """The shards that are durable so far, those of a resumed write included."""
        return tuple(self._shards)

    def completed_bytes(self) -> Iterator[bytes]:
        """The records of the completed shards, in the order in which they were written."""
        for shard in self._shards:
            reader = open_shard(self._work, shard)
            for index in range(shard.records):
                yield reader.read([index])[0]
            reader.close()

    def write_bytes(self, data: bytes, items: int) -> None:
        """Add one record that holds `items` items."""
        with self._disk_errors():
            if self._writer is None:
                # One record a group: random access then reads no more than it needs.
                self._writer = ArrayRecordWriter(str(self._work / "shard.tmp"), "group_size:1")
            self._writer.write(data)
            self._records += 1
            self._items += items
            if self._records == self.records_per_shard:
                self._close_shard()

    def _close_shard(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        temporary, stem = self._work / "shard.tmp", f"{len(self._shards):05d}"
        sync(temporary)
        name, size = f"{stem}.array_record", temporary.stat().st_size
        shard = Shard(name, self._records, self._items, size, sha256_of(temporary))
        temporary.rename(self._work / name)
        # The note says that the shard is complete, so it comes second.
        note = {"schema_version": self.schema_version, "shard": dataclasses.asdict(shard)}
        write_synced(self._work / "note.tmp", json.dumps(note))
        (self._work / "note.tmp").rename(self._work / f"{stem}.json")
        sync(self._work)
        self._shards.append(shard)
        self._records = self._items = 0

    def finish(self) -> Manifest:
        """Close the last shard and publish the split; UserError when nothing was written."""
        with self._disk_errors():
            if self._records:
                self._close_shard()
            if not self._shards:
                self.abort()
                problem = "no record was written"
                raise UserError(problem, file=self.directory, field="split", value=self.split)
            with locked(self.directory / ".lock"):
                manifest = self._publish()
            shutil.rmtree(self._work)
            self._lock.close()
        return manifest

    def _publish(self) -> Manifest:
        path = self.directory / MANIFEST
        others = dict(load_manifest(path).splits) if path.exists() else {}
        replaced = others.pop(self.split, None)
        without = Manifest(self.directory, self.dataset, self.schema_version, others)
        count = len(self._shards)
        moves = [(s, shard_name(self.dataset, self.split, i, count)) for i, s in enumerate(self._shards)]
        split = Split(tuple(dataclasses.replace(shard, file=name) for shard, name in moves), self.metadata)
        manifest = dataclasses.replace(without, splits={**others, self.split: split})
        # All that needs space is written first; after that there are only renames.
        write_synced(self._work / FEATURES, self.features_text())
        write_synced(self._work / "without.json", manifest_text(without))
        write_synced(self._work / MANIFEST, manifest_text(manifest))
        write_synced(self._work / DATASET_INFO, dataset_info_text(manifest))
        if replaced is not None:  # while its shards are replaced, nobody may read them
            (self.directory / DATASET_INFO).unlink(missing_ok=True)
            (self._work / "without.json").rename(path)
            sync(self.directory)
        for stale in self.directory.glob(f"{self.dataset}-{self.split}.array_record-*"):
            stale.unlink()
        # From the last to the first: if this is interrupted, what can be resumed is still an unbroken row.
        for shard, name in reversed(moves):
            (self._work / shard.file).rename(self.directory / name)
        sync(self.directory)
        for name in (FEATURES, MANIFEST, DATASET_INFO):
            (self._work / name).rename(self.directory / name)
            sync(self.directory)
        return manifest

    def abort(self) -> None:
        """Give up: remove what was written, except (with `resume`) the completed shards."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # it may fail for the reason that we give up for
                self._writer.close()
            self._writer = None
        self._records = self._items = 0
        if self.resume and self._shards:
            for path in self._work.glob("*.tmp"):
                path.unlink()
        else:
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # ArrayRecord says as RuntimeError what the system said
            full = disk_is_full(error)
            if hasattr(self, "_lock"):
                self.abort()
            kept = "; with resume the completed shards are kept" if self.resume else ""
            raise UserError(
                "the disk is full" if full else f"cannot write the data set ({error})",
                file=self.directory,
                mend=f"Free some space and write again{kept}" if full else "Check the directory's permissions",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._lock.closed:  # finished or given up already
            return
        if kind is None:
            self.finish()
        else:
            self.abort()
