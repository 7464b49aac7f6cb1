"""Runs that are killed, at random and at every single step, end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import prep_samples
import pytest
from prep_runs import config_of, lines, prepared, records, rejects, start, tree

from csp_jax.errors import UserError
from data_prep.ledger import LEDGER
from data_prep.pack import WORK, split_of
from data_prep.run import prepare
from data_prep.verify import verify


def many(root: Path, count: int, pictures: int) -> None:
    """`count` questions about `pictures` pictures; every seventh row is bad in one of several ways."""
    root.mkdir(parents=True)
    for number in range(pictures):
        (root / f"{number}.png").write_bytes(prep_samples.jpeg_bytes(number, quality=60))
    rows = []
    for number in range(count):
        row = {"image": f"{number % pictures}.png", "question": f"Is there a mug number {number}?", "answer": "yes"}
        row["regions"] = [{"box": list(prep_samples.BOX)}]
        if number % 7 == 3:
            row |= [{"question": ""}, {"image": "none.png"}, {"regions": [{"box": [0, 0, 1, 1]}]}][number % 3]
        rows.append(row)
    prep_samples.write_lines(root / "questions.jsonl", rows)


@pytest.mark.slow
def test_two_thousand_items_killed_five_times_at_random(tmp_path):
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    many(source, 2000, 40)
    assert start("run", source, whole).wait() == 0
    chance = random.Random(7)
    for kill in range(5):
        process = start("run", source, out)
        # anywhere within the next fifth: of what is on disk, and then of a few milliseconds
        target = chance.randrange(kill * 400, kill * 400 + 300)
        while lines(out / WORK / LEDGER) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        assert process.poll() is None, "finished before it could be killed"
        process.kill()
        process.wait()
    assert start("run", source, out).wait() == 0
    assert tree(out) == tree(whole)
    totals = verify(out)
    assert totals["rows"] == 2000
    ids = [item.id for split in ("train", "test") for record in records(out, split) for item in record.items]
    ids += [reject["id"] for reject in rejects(out)]
    assert len(ids) == len(set(ids)) == 2000


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs that sync every step would wait for the disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_killed_at_every_touch_of_the_disk(memory):
    """Every rename, sync, unlink, mkdir and rmdir of a run, before and after it; publishing included."""
    source, whole = memory / "source", memory / "whole"
    many(source, 18, 7)
    config = config_of(
        "folder", source, whole, batch=4, pack={"splits": {"train": 0.7, "test": 0.3}, "records_per_shard": 3}
    )
    prepare(config)
    assert len(records(whole, "train")) > 3
    assert len(records(whole, "test")) > 3
    assert start("each", source, memory / "out", whole).wait() == 0


def test_a_finished_run_is_left_alone(tmp_path):
    first = prepared("pope", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    again = prepared("pope", tmp_path)
    assert again.repeated
    assert again.totals == first.totals
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")} == before


def interrupted(tmp_path: Path, **settings: object) -> None:
    """A run that stops in its middle with some shards complete."""
    many(tmp_path / "folder", 30, 6)

    def stop(rows: int, totals: object) -> None:
        if rows >= 16:
            raise KeyboardInterrupt

    pack = {"records_per_shard": 4}
    config = config_of("folder", tmp_path / "folder", tmp_path / "out", batch=4, pack=pack, **settings)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=stop)


def test_other_settings_do_not_go_on_with_an_unfinished_run(tmp_path):
    interrupted(tmp_path)
    common = {"batch": 4, "pack": {"records_per_shard": 4}}
    with pytest.raises(UserError, match="another settings"):
        prepared("folder", tmp_path, **common, seed=1)
    # what decides nothing about the content may change
    moved = config_of(
        "folder", tmp_path / "folder", tmp_path / "out", **common, run={"threads": 3, "queue": 1, "progress": False}
    )
    done = prepare(moved)
    assert done.resumed == 12
    assert done.totals["rows"] == 30


def test_exchanged_source_files_do_not_go_on_with_an_unfinished_run(tmp_path):
    interrupted(tmp_path)
    file = tmp_path / "folder" / "questions.jsonl"
    file.write_text(file.read_text() + json.dumps({"image": "0.png", "question": "Is there a cup?"}) + "\n")
    with pytest.raises(UserError, match="another source"):
        prepared("folder", tmp_path, batch=4, pack={"records_per_shard": 4})


def test_overwrite_starts_again_and_spares_what_is_not_ours(tmp_path):
    interrupted(tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    config = config_of("folder", tmp_path / "folder", tmp_path / "out", seed=1)
    done = prepare(config, overwrite=True)
    assert done.resumed == 0
    assert verify(tmp_path / "out")["rows"] == 30
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="another run wrote"):
        prepare(config_of("folder", tmp_path / "folder", tmp_path / "out", seed=2))
    other = config_of("folder", tmp_path / "folder", tmp_path / "out", dataset="other")
    with pytest.raises(UserError, match="holds data set 'folder'"):
        prepare(other, overwrite=True)


def test_two_runs_cannot_write_one_data_set(tmp_path):
    from data_prep.pack import Packer

    with (
        Packer(tmp_path / "out", "folder", {"train": 1.0}, 4, {}, {}),
        pytest.raises(UserError, match="another process"),
    ):
        Packer(tmp_path / "out", "folder", {"train": 1.0}, 4, {}, {})


def test_splits_go_by_picture_and_come_out_as_asked():
    shares = {"train": 0.8, "validation": 0.15, "test": 0.05}
    found = [split_of(f"picture {n}", shares) for n in range(20000)]
    for name, share in shares.items():
        assert abs(found.count(name) / len(found) - share) < 4 * (share * (1 - share) / len(found)) ** 0.5
    assert found == [split_of(f"picture {n}", shares) for n in range(20000)]


def test_no_picture_is_in_two_splits(tmp_path):
    many(tmp_path / "folder", 60, 12)
    done = prepared("folder", tmp_path, pack={"splits": {"train": 0.5, "test": 0.5}})
    train, test = ({record.image_id for record in records(done.directory, split)} for split in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_a_split_that_nothing_falls_into_is_left_out(tmp_path):
    done = prepared("okvqa", tmp_path, pack={"splits": {"train": 0.999999, "test": 0.000001}})
    assert verify(done.directory)["records"] == 1
    assert [path.name for path in done.directory.glob(".*") if path.name != ".lock"] == []
