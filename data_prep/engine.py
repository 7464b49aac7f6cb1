"""Where the stages run: in this process, each in a thread of its own, so that decoding, models and packing overlap.

Batches keep their order. What is heavy in a stage (decoding, matrix products, GrabCut, compression) lets other
threads run meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from data_prep.unit import Stage, Unit

Value = TypeVar("Value")
_POLL = 0.1  # seconds after which a waiting thread looks whether it is still wanted


@dataclass
class Clock:
    """Seconds that a stage worked, and on how many units."""

    seconds: float = 0.0
    units: int = 0

    @property
    def rate(self) -> float:
        """Units a second while it worked."""
        return self.units / self.seconds if self.seconds else 0.0


@dataclass
class Clocks:
    """The clocks of all stages, in order."""

    of: dict[str, Clock] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Clock:
        return self.of.setdefault(name, Clock())

    @property
    def slowest(self) -> str:
        """The stage that the others wait for."""
        return max(self.of, key=lambda name: self.of[name].seconds)


class Engine(Protocol):
    """Runs the stages somewhere; `weights` are the hashes of what they run."""

    weights: dict[str, Any]

    def run(self, batches: Iterable[list[Unit]], clocks: Clocks) -> Iterator[list[Unit]]:
        """Every batch through every stage, each once and in order, whatever happens to those who work."""
        ...

    def close(self) -> None:
        """Let go of what was taken up."""
        ...


class _End:
    """Sent through a queue behind the last value, with the error that ended it."""

    def __init__(self, error: BaseException | None):
        self.error = error


def ahead(values: Iterable[Value], size: int, stop: threading.Event) -> Iterator[Value]:
    """The same values, made up to `size` ahead in a thread; its error comes out here. `stop` ends the thread."""
    waiting: queue.Queue[Value | _End] = queue.Queue(size)

    def put(value: Value | _End) -> bool:
        while not stop.is_set():
            try:
                waiting.put(value, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for value in values:
                if not put(value):
                    return
            put(_End(None))
        except BaseException as error:
            put(_End(error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            value = waiting.get(timeout=_POLL)
        except queue.Empty:
            if stop.is_set():
                return
            continue
        if isinstance(value, _End):
            if value.error is not None:
                raise value.error
            return
        yield value


def _apply(stage: Stage, batches: Iterable[list[Unit]], clock: Clock) -> Iterator[list[Unit]]:
    for batch in batches:
        start = time.perf_counter()
        stage(batch)
        clock.seconds += time.perf_counter() - start
        clock.units += len(batch)
        yield batch


def run_stages(
    batches: Iterable[list[Unit]], stages: list[Stage], *, queue_size: int, clocks: Clocks
) -> Iterator[list[Unit]]:
    """Every batch through every stage, in order; an error of any stage ends the whole."""
    stop = threading.Event()
    try:
        stream = ahead(batches, queue_size, stop)
        for stage in stages:
            stream = ahead(_apply(stage, stream, clocks[stage.name]), queue_size, stop)
        yield from stream
    finally:
        stop.set()


class LocalEngine:
    """The stages of this process."""

    def __init__(self, stages: list[Stage], weights: dict[str, Any], queue_size: int):
        self.stages, self.weights, self.queue_size = stages, weights, queue_size

    def run(self, batches: Iterable[list[Unit]], clocks: Clocks) -> Iterator[list[Unit]]:
        """Every batch through every stage, in order."""
        return run_stages(batches, self.stages, queue_size=self.queue_size, clocks=clocks)

    def close(self) -> None:
        """Nothing has to be let go of."""


def run_in_turn(batches: Iterable[list[Unit]], stages: list[Stage], clocks: Clocks) -> Iterator[list[Unit]]:
    """The same without threads: what the overlap is measured against."""
    stream: Iterable[list[Unit]] = batches
    for stage in stages:
        stream = _apply(stage, stream, clocks[stage.name])
    yield from stream
