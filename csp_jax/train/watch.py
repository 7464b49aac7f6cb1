"""Says what a run waits for when nothing moves any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Watch:
    """A thread that reports when the same wait has lasted `limit` seconds, and each time that it has lasted as long
    again; 0: never. `leave` is called after the first report, if given. `waiting`: what the run waits for."""

    def __init__(self, limit: float, say: Callable[[str], None], leave: Callable[[], None] | None = None):
        self.limit, self._say, self._leave = limit, say, leave
        self.waiting, self._since = "the start", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def note(self, waiting: str) -> None:
        """What the run waits for from now on."""
        self.waiting, self._since = waiting, time.monotonic()

    def __enter__(self) -> Watch:
        if self.limit:
            self.note(self.waiting)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        reported: tuple[float, int] = (0.0, 0)
        while not self._over.wait(min(self.limit / 4, 10.0)):
            waiting, since = self.waiting, self._since
            lasted = time.monotonic() - since
            times = int(lasted / self.limit)
            if times and (since, times) != reported:
                reported = (since, times)
                self._say(f"nothing has moved for {lasted:.0f} s: waiting for {waiting}")
                if self._leave is not None:
                    self._leave()
