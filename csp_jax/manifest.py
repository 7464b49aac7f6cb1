"""A data set's directory: which files it has, when it is whole, and how it is read without trusting it.

`dataset_info.json` is the last file that a write puts in place, so a directory without it is not a data set.
A split that is being written lies in `.incomplete-SPLIT/` until its writer moves it into place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from csp_jax.errors import UserError

DATASET_INFO, FEATURES, MANIFEST = "dataset_info.json", "features.json", "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One shard file: its name, how many records and items it holds, its size and SHA-256."""

    file: str
    records: int
    items: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, and what whoever wrote it kept with it (config hash, seeds, ...)."""

    shards: tuple[Shard, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(shard.records for shard in self.shards)

    @property
    def items(self) -> int:
        """Number of items (questions)."""
        return sum(shard.items for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a data set's directory holds."""

    directory: Path
    dataset: str
    schema_version: str
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        """The split of that name; UserError when it isn't there or its write was interrupted."""
        if name in self.splits:
            return self.splits[name]
        if incomplete_directory(self.directory, name).exists():
            raise UserError(
                f"the write of split {name!r} is still running or was interrupted",
                file=self.directory,
                mend="Let it finish, or run the command that writes it again",
            )
        raise UserError(
            "there is no such split",
            file=self.directory,
            field="split",
            value=name,
            mend=f"It has: {', '.join(self.splits)}",
        )


def incomplete_directory(directory: Path, split: str) -> Path:
    """Where a split lies while it is written."""
    return directory / f".incomplete-{split}"


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    """The file name that tensorflow-datasets expects."""
    return f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def load_manifest(path: Path) -> Manifest:
    """The manifest in `path`, whatever its version; UserError when it is missing or no manifest."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            name: Split(tuple(Shard(**shard) for shard in split["shards"]), split["metadata"])
            for name, split in raw["splits"].items()
        }
        return Manifest(path.parent, raw["dataset"], raw["schema_version"], splits)
    except FileNotFoundError as error:
        raise UserError(
            "there is no such file", file=path, mend="Only data sets that csp wrote can be read here"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not a manifest ({error!r})", file=path, mend="Write the data set again") from error


def published_splits(directory: Path) -> tuple[str, ...]:
    """The splits that dataset_info.json lists: the ones whose write was finished."""
    path = directory / DATASET_INFO
    if not path.exists():
        return ()
    try:
        return tuple(split["name"] for split in json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this is no data set's description ({error!r})", file=path) from error


def check_version(manifest: Manifest, supported: str) -> None:
    """UserError unless the data set's major schema version is ours."""
    found = manifest.schema_version
    if found.split(".")[0] != supported.split(".")[0]:
        raise UserError(
            f"this program reads schema version {supported.split('.')[0]}.x",
            file=manifest.directory / MANIFEST,
            field="schema_version",
            value=found,
            mend="Write the data set again with this version of csp_jax, or use the version that wrote it",
        )


def check_complete(directory: Path) -> None:
    """UserError unless a write was finished in this directory."""
    if not directory.is_dir():
        raise UserError("there is no such directory", file=directory, mend="Check the path of the data set")
    if (directory / DATASET_INFO).exists():
        return
    if (directory / MANIFEST).exists() or any(directory.glob(".incomplete-*")):
        raise UserError(
            "the write of this data set is still running or was interrupted",
            file=directory,
            mend="Let it finish, or run the command that writes it again",
        )
    raise UserError(
        f"this is no data set: it has no {DATASET_INFO}",
        file=directory,
        mend="Check the path of the data set",
    )


def manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json."""
    splits = {
        name: {"records": split.records, "items": split.items, **dataclasses.asdict(split)}
        for name, split in manifest.splits.items()
    }
    raw = {"dataset": manifest.dataset, "schema_version": manifest.schema_version, "splits": splits}
    return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def dataset_info_text(manifest: Manifest) -> str:
    """The text of dataset_info.json, as tensorflow-datasets reads it; its version is the schema version."""
    splits = [
        {
            "name": name,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": str(sum(shard.bytes for shard in split.shards)),
            "shardLengths": [str(shard.records) for shard in split.shards],
        }
        for name, split in manifest.splits.items()
    ]
    raw = {
        "name": manifest.dataset,
        "version": manifest.schema_version,
        "description": "Images, key-object regions and questions; fields and units: csp_jax/records.py.",
        "fileFormat": "array_record",
        "splits": splits,
    }
    return json.dumps(raw, indent=1) + "\n"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a text file so that it is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when this process dies; waits for other holders."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_shard(directory: Path, shard: Shard) -> ArrayRecordReader:
    """A random-access reader of one shard; UserError naming the file when it is missing, cut or corrupt."""
    path = directory / shard.file
    mend = "Copy the file again or write the data set again"
    if not path.is_file():
        raise UserError("the shard is missing", file=path, mend=mend)
    if (size := path.stat().st_size) != shard.bytes:
        problem = f"the shard has {size} bytes, its manifest says {shard.bytes}"
        raise UserError(problem, file=path, mend=mend)
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok() or reader.num_records() != shard.records:
        raise UserError(f"the shard is corrupt: {shard.records} records cannot be read", file=path, mend=mend)
    return reader


def verify_checksums(manifest: Manifest, split: str) -> None:
    """UserError naming the first shard of the split whose bytes differ from what was written."""
    for shard in manifest.split(split).shards:
        open_shard(manifest.directory, shard).close()
        if sha256_of(manifest.directory / shard.file) != shard.sha256:
            raise UserError(
                "the shard's bytes are not those that were written (SHA-256 differs)",
                file=manifest.directory / shard.file,
                mend="Copy the file again or write the data set again",
            )
