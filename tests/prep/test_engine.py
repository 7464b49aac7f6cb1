"""The pipeline of threads: order, errors, back-pressure, and that it does what the stages in turn do."""

from __future__ import annotations

import itertools
import threading

import pytest
from prep_runs import config_of, prepared, tree

from data_prep.engine import Clocks, ahead, run_in_turn, run_stages
from data_prep.run import prepare
from data_prep.unit import Unit


class Note:
    """A stage that notes what it saw, and may fail."""

    def __init__(self, name: str, fail_at: int = -1):
        self.name, self.fail_at, self.seen = name, fail_at, []

    def __call__(self, batch: list[Unit]) -> None:
        for unit in batch:
            if unit.number == self.fail_at:
                raise RuntimeError(f"{self.name} cannot do {unit.number}")
            self.seen.append(unit.number)
            unit.counts[self.name] += 1


def batches(count: int, size: int = 3) -> list[list[Unit]]:
    units = [Unit(number, str(number), str(number), None, 1) for number in range(count)]
    return [units[start : start + size] for start in range(0, count, size)]


def test_every_batch_passes_every_stage_once_and_in_order():
    stages, clocks = [Note("a"), Note("b"), Note("c")], Clocks()
    out = list(run_stages(iter(batches(50)), stages, queue_size=2, clocks=clocks))
    assert [unit.number for batch in out for unit in batch] == list(range(50))
    assert all(unit.counts == {"a": 1, "b": 1, "c": 1} for batch in out for unit in batch)
    assert [stage.seen for stage in stages] == [list(range(50))] * 3
    assert [clocks[name].units for name in "abc"] == [50] * 3


def test_an_error_of_a_stage_comes_out_and_ends_the_threads():
    before = threading.active_count()
    stages = [Note("a"), Note("b", fail_at=10), Note("c")]
    stream = run_stages(iter(batches(5000)), stages, queue_size=2, clocks=Clocks())
    got = [unit.number for batch in itertools.islice(stream, 3) for unit in batch]
    with pytest.raises(RuntimeError, match="b cannot do 10"):
        next(stream)
    assert got == list(range(9))
    assert len(stages[0].seen) < 100
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon and "work" in thread.name:
            thread.join(timeout=10)
    assert threading.active_count() <= before


def test_what_nobody_takes_is_not_made():
    made = []

    def source():
        for number in range(1000):
            made.append(number)
            yield number

    stop = threading.Event()
    stream = ahead(source(), 3, stop)
    assert next(stream) == 0
    deadline = threading.Event()
    while len(made) < 4 and not deadline.wait(0.01):
        pass
    assert len(made) <= 6  # one taken, three waiting, one in hand
    stop.set()


def test_an_interruption_of_the_reader_stops_the_writer():
    stream = run_stages(iter(batches(3000)), [Note("a")], queue_size=1, clocks=Clocks())
    next(stream)
    stream.close()
    assert [unit.number for batch in run_in_turn(batches(6), [Note("a")], Clocks()) for unit in batch] == list(range(6))


def test_threads_and_queues_change_nothing(tmp_path):
    first = prepared("coco", tmp_path)
    other = config_of("coco", tmp_path / "coco", tmp_path / "other", run={"threads": 4, "queue": 5, "progress": False})
    prepare(other)
    assert tree(first.directory) == tree(tmp_path / "other")
