"""What one update is made of, on the host: the micro-batches of an accumulation window."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from csp_jax.data.batch import Batch, Packer, Shape
from csp_jax.data.packing import pack
from csp_jax.data.recipes.base import Drawn


@dataclasses.dataclass(frozen=True)
class Window:
    """An accumulation window on the host: a batch with a leading axis of micro-batches, what was counted while it was
    made, and what was measured (beside the metrics of the step)."""

    batch: Batch
    counts: Counter[str]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Windows(Iterator[Window], Protocol):
    """Windows and where among them a run is, as JSON; what `get_state` gives may be set before the first one."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Micro-batches of one shape under a leading axis; arrays of sampled responses where they are there."""
    first = batches[0]
    names = [*Batch.ARRAYS, *(name for name in Batch.POLICY if getattr(first, name) is not None)]
    arrays = {name: np.stack([getattr(batch, name) for batch in batches]) for name in names}
    return Batch(**arrays, groups=first.groups)


@dataclasses.dataclass(frozen=True)
class Collate:
    """Drawn samples -> a window, `samples` a row (`data.packing`): it depends on what was drawn alone.

    `shape` is the largest that a packed window takes; `whole` takes it always, as several hosts must, who would choose
    apart.
    """

    shape: Shape
    accumulation: int
    samples: int = 1
    whole: bool = False

    def __call__(self, drawn: list[Drawn]) -> Window:
        counts: Counter[str] = Counter()
        for item in drawn:
            counts.update(item.counts)
        if self.samples > 1:
            found = [item.sample for item in drawn if item.sample is not None]
            batches, places = pack(found, self.shape, self.accumulation, whole=self.whole)
            if None in places:
                counts["samples_left_over"] += places.count(None)
            return Window(stack_batches(batches), counts)
        packers = [Packer(self.shape) for _ in range(self.accumulation)]
        for number, item in enumerate(drawn):
            if item.sample is not None:
                packers[number // self.shape.rows].add(item.sample, share_rows=False)
        return Window(stack_batches([packer.batch for packer in packers]), counts)
