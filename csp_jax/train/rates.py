"""How fast a run goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from csp_jax.config import RunConfig
from csp_jax.train.peaks import peak_flops


class Rates:
    """What was done since the last line by the time that it took.

    An update is done when its metrics are here. The first one of a process compiles: it has a time of its own and no
    rate, and the clock of the rates starts behind it. `peak`: FLOP/s of all devices together, for the MFU.
    """

    def __init__(self, peak: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self._peak, self._clock = peak, clock
        self._born = clock()
        self._first: float | None = None  # seconds of the first update, until a line has said them
        self._since: float | None = None  # when the last update of the line before was done
        self._latest = 0.0
        self._updates, self._waited = 0, 0.0
        self._sums: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around every wait for the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def done(self, **work: float) -> None:
        """An update is done: its tokens, images, samples and, where they are known, flops."""
        self._latest = self._clock()
        if self._since is None:
            self._first, self._since, self._waited = self._latest - self._born, self._latest, 0.0
            return
        self._updates += 1
        for name, amount in work.items():
            self._sums[name] += amount

    def line(self) -> dict[str, float]:
        """Means and rates since the line before; without updates that count, what the first one took alone."""
        found = {} if self._first is None else {"first_seconds": self._first}
        if self._updates and self._since is not None:
            seconds = self._latest - self._since
            found |= {"seconds": seconds / self._updates, "data_seconds": self._waited / self._updates}
            found |= {f"{name}_per_second": self._sums[name] / seconds for name in ("tokens", "images", "samples")}
            if self._peak and self._sums["flops"]:
                found["mfu"] = self._sums["flops"] / seconds / self._peak
        if self._since is not None:
            self._since = self._latest
        self._first, self._updates, self._waited = None, 0, 0.0
        self._sums.clear()
        return found


def mesh_peak(config: RunConfig, mesh: Mesh) -> float | None:
    """FLOP/s of all devices of a mesh together, as configured or as known; None: neither."""
    own = config.peak_tflops
    one = own * 1e12 if own else peak_flops(mesh.devices.flat[0].device_kind)
    return one * mesh.size if one else None
