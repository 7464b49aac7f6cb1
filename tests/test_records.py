"""The shard contract against itertools, hashlib, tensorflow-datasets, Grain, kills and full disks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from csp_jax.errors import UserError
from csp_jax.manifest import incomplete_directory, verify_checksums
from csp_jax.records import (
    ITEM_COLUMNS,
    RECORD_COLUMNS,
    REGION_COLUMNS,
    SCHEMA_VERSION,
    Item,
    Record,
    Region,
    ShardWriter,
    decode,
    decode_mask,
    encode,
    encode_mask,
    read_manifest,
)

MASK = np.array([[False, True, True], [True, False, False]])


def make_record(number: int = 0, items: int = 2) -> Record:
    """A record with two images, two regions and the given number of items; differs for each number."""
    images = (b"\x89PNG\x00\x00" + bytes([number % 256]), b"\xff\xd8 \x00")
    regions = (
        Region("Katze", (0.0, 0.5, 2.0, 2.0), encode_mask(MASK), 0.25),
        Region("猫", (1.0, 0.0, 1.0, 1.0), encode_mask(~MASK), 1.0, image=1),
    )
    rows = [
        Item(
            id=f"{number}-{index}",
            question=f"Ist eine Katze da? \x00 {number}",
            response="Ja" * index,
            regions=tuple(range(index % 3)),
            candidates=("yes", "no", "")[: index % 4],
            right=index % 3 - 1,
            subsets=("popular",) * (index % 2),
            rejected="nein",
            confidence=12.5 * index,
            perturbed_image=b"\x00" * index,
        )
        for index in range(items)
    ]
    return Record(f"record {number}", "welt", f"image {number // 2}", images, regions, tuple(rows))


def write(directory: Path, count: int, split: str = "train", start: int = 0, **options) -> None:
    with ShardWriter(directory, dataset="world", split=split, records_per_shard=4, **options) as writer:
        for number in range(start, start + count):
            writer.write(make_record(number, items=number % 4))


def stored_records(directory: Path, split: str = "train") -> list[Record]:
    paths = [str(directory / shard.file) for shard in read_manifest(directory).split(split).shards]
    return [decode(data) for data in grain.sources.ArrayRecordDataSource(paths)]


masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9))
percent = st.one_of(st.just(-1.0), st.floats(0, 100, width=32))
edges = st.floats(0, 2**20, width=32)


@st.composite
def records(draw: st.DrawFn) -> Record:
    images = draw(st.lists(st.binary(max_size=20), max_size=3))
    regions = []
    for _ in range(draw(st.integers(0, 3)) if images else 0):
        x0, x1, y0, y1 = (*sorted((draw(edges), draw(edges))), *sorted((draw(edges), draw(edges))))
        image, score = draw(st.integers(0, len(images) - 1)), draw(st.floats(0, 1, width=32))
        regions.append(Region(draw(st.text()), (x0, y0, x1, y1), encode_mask(draw(masks)), score, image))
    texts = st.lists(st.text(), max_size=3).map(tuple)
    indices = st.lists(st.integers(0, len(regions) - 1), max_size=3) if regions else st.just([])
    fields = {name: st.text() for name, column in ITEM_COLUMNS.items() if column.kind == "text"}
    fields |= {"regions": indices.map(tuple), "candidates": texts, "subsets": texts}
    fields |= {"right": st.integers(-1, 1), "confidence": percent, "perturbed_image": st.binary(max_size=9)}
    items = draw(st.lists(st.builds(Item, **fields), max_size=4))
    name, dataset, image_id = draw(st.tuples(st.text(), st.text(), st.text()))
    return Record(name, dataset, image_id, tuple(images), tuple(regions), tuple(items))


@given(masks)
def test_mask_runs_are_those_of_groupby(mask):
    runs = [(bool(value), len(list(group))) for value, group in itertools.groupby(mask.ravel())]
    expected = [length for _, length in runs]
    if not runs or runs[0][0]:
        expected.insert(0, 0)
    assert encode_mask(mask).tolist() == expected
    assert encode_mask(mask).dtype == np.uint32
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), *mask.shape), mask)


def test_a_mask_of_another_image_is_refused():
    with pytest.raises(UserError, match="cover 6 pixels, the image has 4 x 3"):
        decode_mask(encode_mask(MASK), 4, 3)
    with pytest.raises(UserError, match="bool"):
        encode_mask(MASK.astype(np.float32))


@given(records())
@settings(deadline=None)
def test_a_record_comes_back_as_it_was(record):
    data = encode(record)
    assert decode(data) == record
    assert encode(decode(data)) == data


def test_the_tables_name_the_fields_of_the_dataclasses():
    for of, table in ((Region, REGION_COLUMNS), (Item, ITEM_COLUMNS)):
        assert [field.name for field in dataclasses.fields(of)] == list(table)
    assert {*RECORD_COLUMNS, "regions", "items"} == {field.name for field in dataclasses.fields(Record)}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"regions": (Region("x", (3.0, 0.0, 1.0, 1.0), encode_mask(MASK)),)}, "regions.box"),
        ({"regions": (Region("x", (0.0, 0.0, 1.0, 1.0), MASK),)}, "regions.mask"),
        ({"regions": (Region("x", (0.0, 0.0, 1.0, 1.0), encode_mask(MASK), image=2),)}, "regions.image"),
        ({"regions": (Region("x", (0.0, 0.0, 1.0, 1.0), encode_mask(MASK), score=1.5),)}, "regions.score"),
        ({"items": (Item("a", "b", regions=(2,)),)}, "items.regions"),
        ({"items": (Item("a", "b", right=2),)}, "items.right"),
        ({"items": (Item("a", "b", confidence=101.0),)}, "items.confidence"),
        ({"items": (Item("a", None),)}, "items.question"),  # type: ignore[arg-type]
        ({"items": (Item("a", "\ud800"),)}, "items.question"),
        ({"images": ("no bytes", b"")}, "images"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(change, field):
    record = dataclasses.replace(make_record(), **({"items": ()} | change))
    with pytest.raises(UserError, match="record 'record 0'") as caught:
        encode(record)
    assert caught.value.field == field


def test_tensorflow_datasets_reads_the_same_values(tmp_path):
    import tensorflow_datasets as tfds

    write(tmp_path, 11)
    write(tmp_path, 3, split="val")
    builder = tfds.builder_from_directory(tmp_path)
    assert str(builder.version) == SCHEMA_VERSION
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 11,
        "val": 3,
    }
    assert len(builder.as_data_source("val")) == 3
    for number, row in enumerate(builder.as_data_source("train")):
        record = make_record(number, items=number % 4)
        assert [row[name].decode() for name in ("id", "dataset", "image_id")] == [
            record.id,
            record.dataset,
            record.image_id,
        ]
        assert list(row["images"]) == list(record.images)
        assert [text.decode() for text in row["regions"]["keyword"]] == ["Katze", "猫"]
        np.testing.assert_array_equal(row["regions"]["box"], [region.box for region in record.regions])
        assert list(row["regions"]["score"]) == [0.25, 1.0]
        assert list(row["regions"]["image"]) == [0, 1]
        runs = np.frombuffer(row["regions"]["mask"][0], "<u4")
        np.testing.assert_array_equal(decode_mask(runs, *MASK.shape), MASK)
        for name, column in ITEM_COLUMNS.items():
            values = [getattr(item, name) for item in record.items]
            if column.ragged:
                assert list(row["items"][f"{name}_count"]) == [len(value) for value in values]
                values = [entry for value in values for entry in value]
            found = row["items"][name]
            assert [x.decode() if column.kind == "text" else x for x in found] == values, name


def test_grain_reads_what_was_written_in_order(tmp_path):
    write(tmp_path, 11)
    assert stored_records(tmp_path) == [make_record(number, items=number % 4) for number in range(11)]


def test_the_manifest_counts_and_checksums(tmp_path):
    metadata = {"seed": 3, "config": "sha"}
    write(tmp_path, 11, metadata=metadata)
    manifest = read_manifest(tmp_path)
    split = manifest.split("train")
    assert (manifest.dataset, manifest.schema_version, split.metadata) == ("world", SCHEMA_VERSION, metadata)
    assert [shard.records for shard in split.shards] == [4, 4, 3]
    assert (split.records, split.items) == (11, sum(number % 4 for number in range(11)))
    for shard in split.shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (shard.sha256, shard.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(path.name for path in tmp_path.glob("world-*")) == [shard.file for shard in split.shards]
    with pytest.raises(UserError, match=r"split = 'test': there is no such split. It has: train"):
        manifest.split("test")


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, 5)
    assert read_manifest(tmp_path / "one").splits == read_manifest(tmp_path / "two").splits


def without_columns(data: bytes, *names: str) -> bytes:
    """The example without some columns, as a version that did not know them wrote it."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(data)
    for name in names:
        del example.features.feature[name]
    return example.SerializeToString()


def test_an_older_minor_version_is_read_with_defaults(tmp_path):
    record = make_record(items=3)
    data = without_columns(encode(record), "items/rejected", "items/subsets", "items/subsets_count", "regions/image")
    expected = dataclasses.replace(
        record,
        regions=tuple(dataclasses.replace(region, image=0) for region in record.regions),
        items=tuple(dataclasses.replace(item, rejected="", subsets=()) for item in record.items),
    )
    assert decode(data) == expected
    with pytest.raises(UserError, match="items/question"):
        decode(without_columns(data, "items/question"))
    write(tmp_path, 2)
    set_version(tmp_path, "1.7.2")
    assert read_manifest(tmp_path).schema_version == "1.7.2"


def set_version(directory: Path, version: str) -> None:
    raw = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(raw | {"schema_version": version}))


def test_another_major_version_says_what_to_do(tmp_path):
    write(tmp_path, 2)
    set_version(tmp_path, "2.0.0")
    with pytest.raises(UserError, match=r"schema_version = '2.0.0'.* 1\.x.*Write the data set again"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"has schema version 2\.0\.0, not 1\.0\.0"):
        write(tmp_path, 2, split="val")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x0a\x03abc"])
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises(UserError, match="not a record"):
        decode(data)


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path):
    write(tmp_path, 11)
    manifest = read_manifest(tmp_path)
    verify_checksums(manifest, "train")
    path = tmp_path / manifest.split("train").shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256") as caught:
        verify_checksums(manifest, "train")
    assert caught.value.file == path


def test_directories_that_are_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dataset_info\.json"):
        read_manifest(tmp_path)
    write(tmp_path, 1)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: this is not a manifest"):
        read_manifest(tmp_path)


def test_the_writer_refuses_what_would_lose_data(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(UserError, match="'train': the split exists already"):
        write(tmp_path, 2)
    with pytest.raises(UserError, match="holds data set 'world', not 'other'"):
        ShardWriter(tmp_path, dataset="other", split="val")
    with pytest.raises(UserError, match="no record was written"):
        write(tmp_path, 0, split="val")
    for names in ({"dataset": "World", "split": "val"}, {"dataset": "world", "split": "a-b"}):
        with pytest.raises(UserError, match="letters, digits"):
            ShardWriter(tmp_path, **names)
    writer = ShardWriter(tmp_path, dataset="world", split="val")
    with pytest.raises(UserError, match="another process is writing this split"):
        ShardWriter(tmp_path, dataset="world", split="val")
    writer.abort()
    assert len(stored_records(tmp_path)) == 5
    assert not list(tmp_path.glob(".incomplete-*"))


def test_overwriting_replaces_the_split_and_keeps_the_others(tmp_path):
    write(tmp_path, 11)
    write(tmp_path, 3, split="val")
    write(tmp_path, 2, start=50, overwrite=True)
    assert [record.id for record in stored_records(tmp_path)] == ["record 50", "record 51"]
    assert len(stored_records(tmp_path, "val")) == 3
    assert len(list(tmp_path.glob("world-train*"))) == 1


def test_an_error_in_the_with_block_leaves_nothing(tmp_path):
    def fail_on_the_way() -> None:
        with ShardWriter(tmp_path, dataset="world", split="train", records_per_shard=1) as writer:
            writer.write(make_record())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_on_the_way()
    assert list(tmp_path.iterdir()) == []


KILLED_WRITE = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_records import ShardWriter, make_record
writer = ShardWriter(Path(sys.argv[1]), dataset="world", split="train", records_per_shard=4)
for number in range(int(sys.argv[3]), int(sys.argv[4])):
    writer.write(make_record(number, items=number % 4))
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def killed(tmp_path) -> Path:
    """A directory whose writer was killed after 10 records: two shards of 4 completed, a third begun."""
    kill_a_write(tmp_path, 0, 10)
    return tmp_path


def kill_a_write(directory: Path, start: int, end: int) -> None:
    done = run_script(KILLED_WRITE, directory, Path(__file__).parent, start, end)
    assert done.returncode == -9, done.stderr


def test_readers_refuse_a_killed_write_and_the_next_cleans_up(killed):
    with pytest.raises(UserError, match="interrupted"):
        read_manifest(killed)
    write(killed, 3, split="val")
    with pytest.raises(UserError, match="'train' is still running or was interrupted"):
        read_manifest(killed).split("train")
    write(killed, 2)
    assert len(stored_records(killed)) == 2
    assert not list(killed.glob(".incomplete-*"))


def test_a_killed_write_is_resumed_exactly_once(killed, tmp_path_factory):
    with ShardWriter(killed, dataset="world", split="train", records_per_shard=4, resume=True) as writer:
        assert [shard.records for shard in writer.completed] == [4, 4]
        done = {record.id for record in writer.completed_records()}
        for number in range(11):
            if f"record {number}" not in done:
                writer.write(make_record(number, items=number % 4))
    whole = tmp_path_factory.mktemp("whole")
    write(whole, 11)
    assert read_manifest(killed).splits == read_manifest(whole).splits


def test_resuming_never_mixes_two_writes(killed):
    kill_a_write(killed, 50, 54)
    with ShardWriter(killed, dataset="world", split="train", records_per_shard=4, resume=True) as writer:
        assert [record.id for record in writer.completed_records()] == [f"record {n}" for n in range(50, 54)]


KILLED_PUBLISH = """
import os, shutil, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_records import write
root = Path(sys.argv[1])
write(root / "base", 3, split="val")
write(root / "base", 11)
for step in range(100):
    directory = root / str(step)
    shutil.copytree(root / "base", directory)
    if os.fork() == 0:
        left = [step]
        def dying(function):
            def call(*arguments, **options):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*arguments, **options)
            return call
        os.rename, os.unlink = dying(os.rename), dying(os.unlink)
        write(directory, 9, split=sys.argv[3], start=50, overwrite=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
        break
print(step)
"""


def what_is_seen(directory: Path, split: str) -> str:
    try:
        ids = [record.id for record in stored_records(directory, split)]
        verify_checksums(read_manifest(directory), split)
    except UserError as error:
        return "refused" if "interrupted" in str(error) else str(error)
    if ids == [f"record {number}" for number in range(50, 59)]:
        return "new"
    return "old" if ids == [f"record {number}" for number in range(11)] else f"mixed: {ids}"


def check_what_others_see(directory: Path) -> None:
    """tensorflow-datasets goes by dataset_info.json alone: what it lists is there, and is what we list."""
    path = directory / "dataset_info.json"
    if not path.exists():
        return
    listed = {split["name"]: split["shardLengths"] for split in json.loads(path.read_text())["splits"]}
    assert set(listed) == set(read_manifest(directory).splits)
    for name, lengths in listed.items():
        paths = [directory / shard.file for shard in read_manifest(directory).split(name).shards]
        found = [len(grain.sources.ArrayRecordDataSource([str(path)])) for path in paths]
        assert found == [int(length) for length in lengths]


@pytest.mark.parametrize(("split", "others"), [("train", "old refused new"), ("test", "old")])
def test_no_moment_of_publishing_shows_a_half_written_split(tmp_path, split, others):
    """The writer of a replaced or new split is killed at every rename and unlink in turn."""
    done = run_script(KILLED_PUBLISH, tmp_path, Path(__file__).parent, split)
    assert done.returncode == 0, done.stderr
    directories = [tmp_path / str(step) for step in range(int(done.stdout))]
    seen = [what_is_seen(directory, split) for directory in directories]
    assert seen == sorted(seen, key=["old", "refused", "new"].index)
    assert {"refused", "new"} <= set(seen)
    assert {what_is_seen(directory, "train") for directory in directories} == set(others.split())
    for directory in directories:
        check_what_others_see(directory)
        write(directory, 1, split="more")
        assert what_is_seen(directory, split) in ("old", "refused", "new")
        check_what_others_see(directory)
        write(directory, 9, split=split, start=50, overwrite=True)
        assert what_is_seen(directory, split) == "new"
        assert len(stored_records(directory, "val")) == 3
        assert not list(directory.glob(".incomplete-*"))


FULL_DISK = """
import os, sys, subprocess
sys.path.insert(0, sys.argv[2])
from pathlib import Path
root = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], check=True)
print("mounted", flush=True)
from dataclasses import replace
from test_records import ShardWriter, UserError, make_record, stored_records
def fill(resume):
    with ShardWriter(root, dataset="world", split="train", records_per_shard=4, resume=resume) as writer:
        for number in range(40):
            writer.write(replace(make_record(number), images=(os.urandom(30000), b"")))
for resume in (False, True):
    try:
        fill(resume)
    except UserError as error:
        print(error)
    print(sorted(path.name for path in root.rglob("*")))
with ShardWriter(root, dataset="world", split="train", records_per_shard=4, resume=True) as writer:
    print([shard.records for shard in writer.completed])
print(len(stored_records(root)))
"""


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path):
    done = run_script(FULL_DISK, tmp_path, Path(__file__).parent, prefix=("unshare", "--map-root-user", "--mount"))
    if "mounted" not in done.stdout:
        pytest.skip(f"this machine does not let us mount a small file system: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    _, first, empty, second, kept, completed, count = done.stdout.splitlines()
    assert "the disk is full. Free some space" in first
    assert empty == "[]"
    assert "with resume the completed shards are kept" in second
    assert "shard.tmp" not in kept
    assert "00000.array_record" in kept
    assert "dataset_info.json" not in kept
    assert sum(json.loads(completed)) == int(count) > 0


def test_a_device_that_is_always_full(tmp_path):
    """The same error path where nothing can be mounted: the shard is written to /dev/full."""
    writer = ShardWriter(tmp_path, dataset="world", split="train")
    os.symlink("/dev/full", incomplete_directory(tmp_path, "train") / "shard.tmp")
    writer.write(make_record())
    with pytest.raises(UserError, match="the disk is full"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_reading_imports_no_framework():
    script = "import sys, csp_jax.records as r; r.decode(r.encode(r.Record('a', 'b', 'c', (), (), ())));"
    script += "print({'jax', 'torch', 'tensorflow', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    assert run_script(script).stdout.strip() == "set()"
