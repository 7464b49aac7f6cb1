"""`--verify` finds what was changed behind our back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prep_runs import prepared, records

from csp_jax.errors import UserError
from csp_jax.records import Item, Record, Region, ShardWriter, encode_mask, read_manifest
from data_prep.verify import verify


def flip_a_byte(directory: Path) -> None:
    (shard,) = directory.glob("*.array_record-*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))


def drop_a_line(directory: Path, name: str) -> None:
    lines = (directory / name).read_text().splitlines(keepends=True)
    (directory / name).write_text("".join(lines[:-1]))


def change_totals(directory: Path) -> None:
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["train"]["metadata"]["totals"]["rows"] += 1
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (flip_a_byte, "SHA-256|corrupt|cannot be read"),
        (lambda directory: drop_a_line(directory, "rejects.jsonl"), "0 rejects, the ledger has 1"),
        (lambda directory: drop_a_line(directory, "ledger.jsonl"), "records with"),
        (lambda directory: (directory / "ledger.jsonl").unlink(), "missing"),
        (change_totals, "totals"),
    ],
)
def test_harm_is_found(harm, problem, tmp_path):
    done = prepared("amber", tmp_path)
    assert verify(done.directory)["records"] == 6
    harm(done.directory)
    with pytest.raises(UserError, match=problem):
        verify(done.directory)


def rewrite(directory: Path, change) -> None:
    """Write the data set anew with changed records, checksums and all."""
    kept = records(directory)
    metadata = read_manifest(directory).split("train").metadata
    with ShardWriter(directory, dataset="amber", split="train", metadata=metadata, overwrite=True) as writer:
        for record in change(kept):
            writer.write(record)


def changed(record: Record, **values: object) -> Record:
    return Record(**{**vars(record), **values})


def bad_box(kept: list[Record]) -> list[Record]:
    region = Region(**{**vars(kept[0].regions[0]), "box": (0.0, 0.0, 500.0, 20.0)})
    return [changed(kept[0], regions=(region,)), *kept[1:]]


def bad_mask(kept: list[Record]) -> list[Record]:
    import numpy as np

    region = Region(**{**vars(kept[0].regions[0]), "mask": encode_mask(np.ones((3, 3), bool))})
    return [changed(kept[0], regions=(region,)), *kept[1:]]


def bad_perturbed(kept: list[Record]) -> list[Record]:
    item = Item(**{**vars(kept[0].items[0]), "perturbed_image": b"nothing"})
    return [changed(kept[0], items=(item,)), *kept[1:]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda kept: [kept[0], *kept], "twice"),
        (lambda kept: [changed(kept[0], images=(kept[0].images[0][:900],)), *kept[1:]], "cannot be read"),
        (bad_box, "leaves the picture"),
        (bad_mask, "cover 9 pixels"),
        (bad_perturbed, "cannot be read"),
        (lambda kept: kept[1:], "records with"),
    ],
    ids=["twice", "picture", "box", "mask", "perturbed", "lost"],
)
def test_records_that_contradict_their_pictures_are_found(change, problem, tmp_path):
    done = prepared("amber", tmp_path)
    rewrite(done.directory, change)
    with pytest.raises(UserError, match=problem):
        verify(done.directory)
