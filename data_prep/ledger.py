"""What became of every unit, on disk while a run is under way: the memory of a run that was killed.

A line is written before its record, and all lines reach the disk before a shard is completed. So after a kill the
ledger knows at least what the completed shards hold; what it knows beyond that is forgotten and done again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from csp_jax.errors import UserError
from csp_jax.manifest import sync, write_synced

LEDGER, RUN, REJECTS = "ledger.jsonl", "run.json", "rejects.jsonl"
ALL = 1 << 62


class Ledger:
    """One line a unit: its number and split, whether it has a record, how many rows and questions, counts, rejects."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], completed: Mapping[str, int]):
        """Take up the ledger of a run; `completed` says how many records of each split are safe (ALL: published).

        UserError when the folder holds the ledger of another run.
        """
        self._folder = folder
        self._last = dict.fromkeys(completed, -1)
        folder.mkdir(parents=True, exist_ok=True)
        check_identity(folder / RUN, identity)
        if not (folder / RUN).exists():
            write_synced(folder / "run.tmp", json.dumps(identity, indent=1, sort_keys=True) + "\n")
            (folder / "run.tmp").rename(folder / RUN)
        self.totals: Counter[str] = Counter()
        self._take_over(dict(completed))
        self._file: TextIO = (folder / LEDGER).open("a", encoding="utf-8")

    def _take_over(self, left: dict[str, int]) -> None:
        """Keep the lines of each split up to its last safe record."""
        kept: list[str] = []
        waiting: dict[str, list[tuple[str, dict[str, Any]]]] = {split: [] for split in left}
        for line, entry in read_lines(self._folder / LEDGER):
            split = entry["split"]
            if not left[split]:
                continue
            waiting[split].append((line, entry))
            if entry["record"] and left[split] != ALL:
                left[split] -= 1
            if entry["record"] or left[split] == ALL:
                self._accept(kept, waiting[split])
        write_synced(self._folder / "ledger.tmp", "".join(kept))
        (self._folder / "ledger.tmp").rename(self._folder / LEDGER)
        sync(self._folder)
        missing = {split: count for split, count in left.items() if count not in (0, ALL)}
        if missing:
            raise UserError(
                f"the ledger does not know {sum(missing.values())} of the records that are there",
                file=self._folder / LEDGER,
                mend="Start again with --overwrite",
            )

    def _accept(self, kept: list[str], entries: list[tuple[str, dict[str, Any]]]) -> None:
        for line, entry in entries:
            kept.append(line)
            self._last[entry["split"]] = entry["unit"]
            self._count(entry)
        entries.clear()

    def _count(self, entry: dict[str, Any]) -> None:
        self.totals.update(entry_totals(entry))

    @property
    def safe(self) -> dict[str, int]:
        """Of each split, the last unit of which all is safe already (-1: none)."""
        return dict(self._last)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one unit's line; it need not be on the disk yet."""
        self._file.write(json.dumps(entry, ensure_ascii=True, separators=(",", ":")) + "\n")
        self._count(entry)

    def flush(self) -> None:
        """Bring every line onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def publish(self, directory: Path) -> None:
        """Write the finished ledger and the list of rejects beside the shards, in the order of the source."""
        self.flush()
        entries = sorted(
            ((entry["unit"], line) for line, entry in read_lines(self._folder / LEDGER)), key=lambda e: e[0]
        )
        write_synced(self._folder / "published.tmp", "".join(line for _, line in entries))
        (self._folder / "published.tmp").rename(directory / LEDGER)
        rejects = (reject for _, line in entries for reject in json.loads(line)["rejects"])
        text = "".join(json.dumps(reject, ensure_ascii=True) + "\n" for reject in rejects)
        write_synced(self._folder / "rejects.tmp", text)
        (self._folder / "rejects.tmp").rename(directory / REJECTS)
        sync(directory)


def entry_totals(entry: dict[str, Any]) -> Counter[str]:
    """One line as counts that can be added up."""
    totals: Counter[str] = Counter(
        {
            "units": 1,
            "records": int(entry["record"]),
            **{name: entry[name] for name in ("rows", "questions", "items", "merged")},
        }
    )
    totals["rejected"] = len(entry["rejects"])
    for reject in entry["rejects"]:
        totals[f"rejected.{reject['reason']}"] += 1
    totals.update({f"counted.{name}": count for name, count in entry["counts"].items()})
    return totals


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, entry) of a ledger up to its end, or up to a line that a kill cut short."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                yield line, json.loads(line)
            except ValueError:
                return


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """UserError when another run is unfinished in this folder."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if found != identity:
        differs = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
        raise UserError(
            f"an unfinished run with another {' and '.join(differs)} lies here",
            file=path.parent.parent,
            mend="Go on with its configuration and files, choose another `out`, or start again with --overwrite",
        )
