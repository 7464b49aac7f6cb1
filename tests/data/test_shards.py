"""The training stream and evaluation batches: exactly once, the same for any workers, resumable."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import pickle
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from csp_jax.data.shards import ShardSource, record_dataset, training_batches
from csp_jax.errors import UserError
from csp_jax.records import Item, Record, ShardWriter

RECORDS = 23


def make_record(number: int) -> Record:
    items = tuple(Item(f"{number}-{index}", "Is there a cat?", "yes") for index in range(2))
    return Record(str(number), "world", f"image {number}", (bytes(range(number)),), (), items)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, dataset="world", split="train", records_per_shard=5, metadata={"seed": 4}) as writer:
        for number in range(RECORDS):
            writer.write(make_record(number))
    return tmp_path


@pytest.fixture
def source(directory: Path) -> ShardSource:
    return ShardSource(directory, "train")


def draw(record: Record, rng: np.random.Generator) -> tuple[int, int]:
    """A transform that the workers can import."""
    return int(record.id), int(rng.integers(2**60))


def drop(record: Record, rng: np.random.Generator) -> None:
    return None


def test_random_access_threads_and_pickles(source):
    assert (len(source), source.dataset, source.metadata) == (RECORDS, "world", {"seed": 4})
    assert source[22] == make_record(22)
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(RECORDS).tolist() * 4
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(copy.__getitem__, order)) == [make_record(number) for number in order]
    for outside in (-1, RECORDS):
        with pytest.raises(IndexError):
            source[outside]


def test_many_shards_do_not_keep_many_files_open(source, monkeypatch):
    monkeypatch.setattr("csp_jax.data.shards._MAX_OPEN_SHARDS", 2)
    files = {str(source.directory / shard.name) for shard in source.directory.glob("world-*")}
    assert len(files) == 5
    assert [source[number] for number in range(RECORDS)] == [make_record(number) for number in range(RECORDS)]
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len(files & set(map(str, held))) == 2


def test_what_is_missing_is_named(directory):
    with pytest.raises(UserError, match="no such directory"):
        ShardSource(directory / "nowhere", "train")
    with pytest.raises(UserError, match="split = 'val': there is no such split"):
        ShardSource(directory, "val")


@pytest.mark.parametrize(
    ("damage", "problem"), [("gone", "missing"), ("cut", "bytes, its manifest says"), ("zeroed", "corrupt")]
)
def test_a_damaged_shard_is_named(directory, damage, problem):
    source = ShardSource(directory, "train")
    path = directory / "world-train.array_record-00001-of-00005"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if damage == "cut" else bytes(len(data)))
    with pytest.raises(UserError, match=f"{problem}.*Copy the file again or write") as caught:
        source[7]
    assert caught.value.file == path
    assert [source[0], source[10]] == [make_record(0), make_record(10)]


def test_no_flipped_byte_changes_a_record(directory):
    """Wherever a byte is flipped: what is read is right, or the error names the file."""
    path = directory / "world-train.array_record-00001-of-00005"
    data, refused = path.read_bytes(), 0
    for position in [*range(0, 1000, 13), *range(1000, len(data), 4999)]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        source = ShardSource(directory, "train")
        for number in range(5, 10):
            try:
                record = source[number]
            except UserError as error:
                refused += error.file == path
            else:
                assert record == make_record(number)
    assert refused > 0


def batches_of(source: ShardSource, count: int | None = None, **options) -> list[list[tuple[int, int]]]:
    iterator = iter(record_dataset(source, transform=draw, **options))
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def test_workers_change_nothing(source):
    alone, helped = (batches_of(source, 12, batch_size=4, seed=3, num_workers=n) for n in (0, 2))
    assert alone == helped
    numbers = [number for batch in alone for number, _ in batch]
    assert sorted(numbers[:RECORDS]) == sorted(numbers[RECORDS : 2 * RECORDS]) == list(range(RECORDS))
    assert numbers[:RECORDS] != numbers[RECORDS : 2 * RECORDS], "every epoch has its own order"
    assert len({drawn for batch in alone for _, drawn in batch}) == 48, "every position has its own numbers"
    assert alone != batches_of(source, 12, batch_size=4, seed=4)


def test_the_order_and_random_numbers_are_those_of_the_position(source):
    rows = [row for batch in batches_of(source, batch_size=5, seed=9, shuffle=False, repeat=2) for row in batch]
    expected = [(p % RECORDS, int(np.random.default_rng((9, p)).integers(2**60))) for p in range(45)]
    assert rows == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_iterator_goes_on_with_the_same_batches(source, tmp_path, num_workers):
    dataset = record_dataset(source, batch_size=4, seed=3, transform=draw, num_workers=num_workers)
    first, second = iter(dataset), iter(dataset)
    for _ in range(7):
        next(first)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        manager.wait_until_finished()
        following = [next(first) for _ in range(9)]
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    assert [next(second) for _ in range(9)] == following
    first.close()
    second.close()


@pytest.mark.parametrize("host_count", [1, 2, 3, 4])
def test_hosts_share_the_stream_exactly(source, host_count):
    """With the same global batch, the hosts together see at each step what one host alone sees."""
    options = {"seed": 5, "repeat": 3}
    alone = batches_of(source, batch_size=12, **options)
    hosts = [
        batches_of(source, batch_size=12 // host_count, host_index=index, host_count=host_count, **options)
        for index in range(host_count)
    ]
    expected = training_batches(RECORDS, batch_size=12 // host_count, host_count=host_count, repeat=3)
    assert [len(batches) for batches in hosts] == [expected] * host_count == [5] * host_count
    together = [sorted(itertools.chain(*step)) for step in zip(*hosts, strict=True)]
    assert together == [sorted(batch) for batch in alone]


def test_what_is_left_out_is_said(source, caplog):
    with caplog.at_level(logging.INFO):
        numbers = [n for batch in batches_of(source, batch_size=5, seed=0, repeat=1) for n, _ in batch]
    assert len(numbers) == len(set(numbers)) == 20
    assert "the last 3 of 23 records are left out" in caplog.text
    with pytest.raises(UserError, match="23 records do not fill one batch of 8 on 3 hosts"):
        record_dataset(source, batch_size=8, seed=0, host_count=3, repeat=1)


def test_impossible_arguments_are_refused(source):
    for options, field in (
        ({"host_index": 2, "host_count": 2}, "host_index"),
        ({"repeat": 0}, "repeat"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UserError) as caught:
            record_dataset(source, **{"batch_size": 2, "seed": 0} | options)
        assert caught.value.field == field
    with pytest.raises(ValueError, match="returned None for record"):
        next(iter(record_dataset(source, batch_size=2, seed=0, transform=drop)))


def test_a_worker_that_meets_a_damaged_shard_names_it(directory):
    source = ShardSource(directory, "train")
    (directory / "world-train.array_record-00002-of-00005").unlink()
    iterator = iter(record_dataset(source, batch_size=4, seed=0, shuffle=False, num_workers=1, repeat=1))
    with pytest.raises(Exception, match="array_record-00002-of-00005: the shard is missing"):
        list(iterator)
    iterator.close()
