"""Batches through one data set of Ray Data: order, back-pressure, lost processes, errors in their place."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prep_runs import config_of

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.engine import Clocks
from data_prep.ray_engine import RayEngine
from data_prep.unit import Unit

pytest.importorskip("ray", reason="ray is not installed: make test-sam runs this")


@dataclass
class Counted:
    """Batches of a unit each, without a picture; every one that is read leaves a mark in a file."""

    marks: Path
    count: int
    kill_at: int = -1  # the reading process kills itself before it makes this one, once
    fail_at: int = -1  # here the source turns out to be broken

    def __iter__(self) -> Iterator[list[Unit]]:
        for number in range(self.count):
            if number == self.kill_at and not self.marks.with_suffix(".killed").exists():
                self.marks.with_suffix(".killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.fail_at:
                raise UserError("is broken", file="rows.json", mend="Download the file again")
            with self.marks.open("a") as file:
                file.write(".")
            yield [Unit(number, f"unit {number}", f"picture {number}", None, 1)]

    @property
    def read(self) -> int:
        return self.marks.stat().st_size if self.marks.exists() else 0


class Deadly:
    """A picture that ends the process that opens it."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Faulty:
    """A picture whose reading raises what no stage expects, and what cannot be pickled."""

    def read(self) -> bytes:
        class LocalError(Exception):
            pass

        raise LocalError("of the program's own")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[RayEngine]:
    """Two workers on a cluster of their own, whose processes find this file."""
    folder = tmp_path_factory.mktemp("engine")
    way = {"engine": "ray", "workers": 2, "cpus": 0.5, "threads": 1, "retries": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        engine = RayEngine(config_of("folder", folder, folder / "out", run=way))
        yield engine
        engine.close()


def places(batches: Iterable[list[Unit]]) -> list[int]:
    return [unit.number for batch in batches for unit in batch]


def with_picture(image: Any) -> Unit:
    item = Item("item", "Is there a ball?", "yes", "ball", (), "yes", ("yes", "no"), 1)
    return Unit(3, "unit", "picture", image, 1, [item], {"item": "here"})


def test_the_source_is_read_only_so_far_ahead_of_what_is_packed(engine, tmp_path):
    batches = Counted(tmp_path / "marks", 60)
    ahead = 2 * (engine.config.run.queue + 1)
    found, most = [], 0
    for batch in engine.run(batches, Clocks()):
        if not found:
            deadline = time.monotonic() + 30
            while batches.read < ahead and time.monotonic() < deadline:
                time.sleep(0.05)
        if len(found) < 3:
            time.sleep(1)  # time enough for a reader that nobody stops
        most = max(most, batches.read - len(found))
        found += places([batch])
    assert found == list(range(60))
    assert most == ahead
    assert len(engine.processes) >= 2


def test_a_killed_reader_loses_and_doubles_nothing(engine, tmp_path):
    batches = Counted(tmp_path / "marks", 40, kill_at=17)
    assert places(engine.run(batches, Clocks())) == list(range(40))
    assert batches.read == 17 + 40  # from the beginning


def test_a_source_that_breaks_and_a_stage_that_fails_are_raised_in_their_place(engine, tmp_path):
    stream = engine.run(Counted(tmp_path / "marks", 40, fail_at=9), Clocks())
    assert places(itertools.islice(stream, 9)) == list(range(9))
    with pytest.raises(UserError, match=r"rows\.json: is broken"):
        next(stream)
    stream = engine.run([*Counted(tmp_path / "more", 3), [with_picture(Faulty())]], Clocks())
    assert places(itertools.islice(stream, 3)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="LocalError: of the program's own"):
        next(stream)


def test_a_batch_that_kills_every_worker_is_one_clear_line(engine):
    with pytest.raises(UserError, match="a worker was lost 2 times at the same batch") as caught:
        places(engine.run([[with_picture(Deadly())]], Clocks()))
    assert "\n" not in str(caught.value)


def test_no_batches_and_an_engine_that_is_used_again(engine):
    assert places(engine.run([], Clocks())) == []


def test_a_worker_with_other_weights_says_so(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "weights", {"segment": "others"})
    with pytest.raises(UserError, match="the weights on"):
        places(engine.run(Counted(tmp_path / "marks", 3), Clocks()))
