"""The last stage: units -> records -> shards of every split, each exactly once however often the run is killed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from csp_jax.errors import UserError
from csp_jax.manifest import DATASET_INFO, FEATURES, MANIFEST, incomplete_directory, load_manifest, published_splits
from csp_jax.records import Item, Record, Region, ShardWriter, encode_mask
from data_prep.ledger import ALL, LEDGER, REJECTS, Ledger
from data_prep.unit import Unit

WORK, DONE = ".prep", ".prep-done"  # what an unfinished run needs beside its completed shards; the same, to be deleted


def split_of(image_id: str, splits: Mapping[str, float]) -> str:
    """The split of a picture: a hash of its id against the splits' cumulative shares."""
    place = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64
    share = 0.0
    for name, part in splits.items():
        share += part
        if place < share:
            return name
    return name


def make_record(unit: Unit, dataset: str) -> Record:
    """The record of a unit whose regions are segmented; regions that no question needs are left out."""
    items = unit.made or unit.items
    used = sorted({index for item in items for index in item.regions})
    place = {index: number for number, index in enumerate(used)}
    regions = tuple(
        Region(
            keyword=unit.regions[index].keyword,
            box=unit.regions[index].box,
            mask=encode_mask(unit.mask(index)),
            score=unit.regions[index].score,
        )
        for index in used
    )
    moved = tuple(_with_regions(item, tuple(place[index] for index in item.regions)) for item in items)
    return Record(unit.key, dataset, unit.image_id, (unit.encoded,), regions, moved)


def _with_regions(item: Item, regions: tuple[int, ...]) -> Item:
    return Item(**{**vars(item), "regions": regions})


def entry_of(unit: Unit, split: str) -> dict[str, Any]:
    """The unit's line in the ledger."""
    packed = bool(unit.items)
    used = sorted({index for item in unit.items for index in item.regions})
    return {
        "unit": unit.number,
        "key": unit.key,
        "split": split,
        "record": packed,
        "rows": unit.rows,
        "questions": len(unit.items),
        "items": len(unit.made or unit.items),
        "merged": unit.merged,
        "counts": {name: count for name, count in sorted(unit.counts.items()) if count},
        "regions": [_region_line(unit, index) for index in used],
        "rejects": [vars(reject) for reject in unit.rejects],
    }


def _region_line(unit: Unit, index: int) -> dict[str, Any]:
    region = unit.regions[index]
    x0, y0, x1, y1 = region.box
    height, width = unit.size
    return {
        "keyword": region.keyword,
        "origin": region.origin,
        "score": round(region.score, 4),
        "mask_score": round(region.mask_score, 4),
        "box_area": round((x1 - x0) * (y1 - y0) / (height * width), 6),
        "mask_area": round(np.count_nonzero(unit.mask(index)) / (height * width), 6),
    }


@dataclass(frozen=True)
class Done:
    """Was a unit safe already when this run began? The answer never changes, and can be asked anywhere."""

    splits: Mapping[str, float]
    last: Mapping[str, int]  # of each split, the last unit that is safe

    def __call__(self, unit: Unit) -> bool:
        return unit.number <= self.last[split_of(unit.image_id, self.splits)]


class Packer:
    """Writes one data set. Use as a context; `finish` publishes it, leaving without it keeps what is complete.

    UserError: another run's data set or another process is in the way, the disk is full.
    """

    def __init__(
        self,
        directory: Path,
        dataset: str,
        splits: Mapping[str, float],
        records_per_shard: int,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any],
    ):
        self.settings = dict(settings)
        self.directory, self.dataset, self.splits = directory, dataset, dict(splits)
        self.records_per_shard, self.identity = records_per_shard, dict(identity)
        self._lock = _hold(directory / WORK)
        self._published = self._check_published()
        self._writers = {name: self._writer(name) for name in self.splits if name not in self._published}
        completed = dict.fromkeys(self._published, ALL)
        self._written = {name: sum(s.records for s in writer.completed) for name, writer in self._writers.items()}
        self.ledger = Ledger(directory / WORK, identity, {**completed, **self._written})
        self.done = Done(self.splits, self.ledger.safe)

    def _writer(self, split: str) -> ShardWriter:
        return ShardWriter(
            self.directory,
            dataset=self.dataset,
            split=split,
            records_per_shard=self.records_per_shard,
            resume=True,
        )

    def _check_published(self) -> set[str]:
        """The splits of this very run that are finished; UserError when they are of another."""
        if not (self.directory / MANIFEST).exists():
            return set()
        manifest = load_manifest(self.directory / MANIFEST)
        found = set()
        for name in published_splits(self.directory):
            if manifest.splits[name].metadata.get("run") != self.identity or name not in self.splits:
                raise UserError(
                    "the folder holds a data set that another run wrote",
                    file=self.directory,
                    field="split",
                    value=name,
                    mend="Choose another `out`, or replace it with --overwrite",
                )
            found.add(name)
        return found

    @property
    def resumed(self) -> int:
        """Records that were there already."""
        return sum(self._written.values())

    def split(self, unit: Unit) -> str:
        """The split that a unit belongs to."""
        return split_of(unit.image_id, self.splits)

    def add(self, unit: Unit) -> None:
        """Note what became of a unit and write its record, if it has one."""
        split = self.split(unit)
        record = make_record(unit, self.dataset) if unit.items else None
        self.ledger.append(entry_of(unit, split))
        if record is None:
            return
        self._written[split] += 1
        if self._written[split] % self.records_per_shard == 0:
            self.ledger.flush()  # writing this record completes a shard
        self._writers[split].write(record)

    def finish(self) -> Counter[str]:
        """Publish the splits, the ledger and the rejects; returns the run's totals. UserError when all was rejected."""
        totals = self.ledger.totals
        check_totals(totals)
        self.ledger.publish(self.directory)
        if not totals["records"]:
            raise UserError(
                f"no question could be used: {_most(totals)}",
                file=self.directory / REJECTS,
                mend="The file names every row and its reason",
            )
        for name, writer in self._writers.items():
            if self._written[name]:
                writer.metadata |= {
                    "run": self.identity,
                    "settings": self.settings,
                    "totals": dict(sorted(totals.items())),
                }
                writer.finish()
            else:
                writer.abort()
        self.ledger.close()
        for split in self._published:  # killed between publishing a split and tidying up after it
            shutil.rmtree(incomplete_directory(self.directory, split), ignore_errors=True)
        (self.directory / WORK).rename(self.directory / DONE)  # half a work folder would look like an unfinished run
        shutil.rmtree(self.directory / DONE)
        return totals

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            for writer in self._writers.values():
                with contextlib.suppress(UserError):
                    writer.abort()
        self.ledger.close()
        self._lock.close()


def check_totals(totals: Counter[str]) -> None:
    """RuntimeError unless every row was packed, rejected or merged: a mistake in the program."""
    rows, found = totals["rows"], totals["questions"] + totals["rejected"] + totals["merged"]
    if rows != found:
        raise RuntimeError(f"{rows} rows went in, {found} came out")


def _most(totals: Counter[str]) -> str:
    reasons = Counter({n.partition(".")[2]: c for n, c in totals.items() if n.startswith("rejected.")})
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "the source is empty"


def _hold(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=folder.parent, field="out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError("another process is preparing this data set", file=folder.parent, field="out") from None
    return lock


def finished_totals(directory: Path, identity: Mapping[str, Any]) -> Counter[str] | None:
    """The totals of this very run if it was finished before; None if there is anything left to do."""
    if (directory / WORK).exists() or not (directory / DATASET_INFO).exists():
        return None
    manifest = load_manifest(directory / MANIFEST)
    for split in manifest.splits.values():
        if split.metadata.get("run") == dict(identity):
            shutil.rmtree(directory / DONE, ignore_errors=True)
            return Counter(split.metadata["totals"])
    return None


def remove_dataset(directory: Path, dataset: str) -> None:
    """Delete what runs of this data set left in a folder; UserError when the folder is another data set's."""
    if (directory / MANIFEST).exists():
        found = load_manifest(directory / MANIFEST).dataset
        if found != dataset:
            raise UserError(f"holds data set {found!r}, not {dataset!r}", file=directory, mend="Choose another `out`")
    for name in (DATASET_INFO, MANIFEST, FEATURES, LEDGER, REJECTS):
        (directory / name).unlink(missing_ok=True)
    for path in _own_files(directory, dataset):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _own_files(directory: Path, dataset: str) -> Iterator[Path]:
    for pattern in (WORK, DONE, ".incomplete-*", f"{dataset}-*.array_record-*"):
        yield from directory.glob(pattern)
