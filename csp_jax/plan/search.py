"""From a configuration and a target to a plan: what was tried, what fits, what is best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from csp_jax.config import TrainConfig
from csp_jax.errors import UserError
from csp_jax.plan.targets import Target

# What keeps fewer activations.
STRONGER = {"none": "weights", "dots": "weights", "weights": "save_names", "save_names": "full"}
MOST_ROWS = 8  # a device: beyond that matrix products gain nothing
# Of weights in a TPU slice. Of 64 parts of a matrix none is as wide as a tile: the compiler then sums whole matrices,
# padded with zeros, over all devices, where it otherwise gathers and scatters parts.
PARTS = 16
FEW_ROWS = 4  # a device: to have fewer costs more than to recompute
WORTH = 1.02  # by how much more rows have to raise the estimated MFU


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a plan may change of a configuration; rows are a micro-batch's over all devices."""

    data: int
    fsdp: int
    tensor: int
    rows: int
    accumulation: int
    remat: str
    attention: str = "xla"

    @classmethod
    def of(cls, config: TrainConfig, target: Target) -> Candidate:
        """A configuration on a target, the mesh completed; UserError if it does not divide."""
        mesh = config.parallel
        data = mesh.data if mesh.data != -1 else max(target.devices // (mesh.fsdp * mesh.tensor), 1)
        batch, model = config.batch, config.model
        found = cls(data, mesh.fsdp, mesh.tensor, batch.rows, batch.accumulation, model.remat, model.attention)
        if data * mesh.fsdp * mesh.tensor != target.devices:
            raise UserError(
                f"the mesh takes {data * mesh.fsdp * mesh.tensor} devices, {target} has {target.devices}",
                field="parallel",
                value=found.mesh,
                mend="data x fsdp x tensor must be the number of devices; data: -1 takes what is left",
            )
        if config.batch.rows % found.split:
            raise UserError(
                f"rows must divide by data x fsdp = {found.split}",
                field="batch.rows",
                value=config.batch.rows,
                mend=f"Use a multiple of {found.split}",
            )
        return found

    @property
    def split(self) -> int:
        """Over how many parts rows are split."""
        return self.data * self.fsdp

    @property
    def rows_a_device(self) -> float:
        return self.rows / self.split

    @property
    def mesh(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def update(self) -> int:
        """Rows that an update is made of."""
        return self.rows * self.accumulation

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The configuration with this mesh, batch and recomputation."""
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=self.mesh),
                "batch": config.batch.model_copy(update={"rows": self.rows, "accumulation": self.accumulation}),
                "model": config.model.model_copy(update={"remat": self.remat, "attention": self.attention}),
            }
        )

    def with_rows(self, rows: int, update: int) -> Candidate:
        """Other rows, and as many micro-batches as keep an update's size (at least one)."""
        return dataclasses.replace(self, rows=rows, accumulation=max(update // rows, 1))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate and what the compiler said of it."""

    candidate: Candidate
    found: dict[str, Any]
    available: int

    @property
    def peak(self) -> int | None:
        return self.found.get("bytes_peak")

    @property
    def fits(self) -> bool:
        """Compiled, and under what the allocator may use."""
        return "error" not in self.found and self.peak is not None and self.peak <= self.available

    @property
    def mfu(self) -> float:
        return self.found.get("mfu", 0.0)


class Measure(Protocol):
    def __call__(self, config: TrainConfig, folder: Path) -> dict[str, Any]: ...


def own_candidate(config: TrainConfig, target: Target) -> Candidate | None:
    """The configuration as it is; None where its mesh is not one of the target."""
    try:
        return Candidate.of(config, target)
    except UserError:
        return None


def on_target(config: TrainConfig, target: Target) -> Candidate:
    """A configuration that is not for the target: weights split within a host (of a TPU slice over up to `PARTS`),
    rows over the rest, and the configuration's rows a device."""
    fsdp = target.per_host if target.card.platform == "cuda" else math.gcd(target.devices, PARTS)
    data = target.devices // fsdp
    rows_a_device = max(config.batch.rows // (config.parallel.fsdp * max(config.parallel.data, 1)), 1)
    update = config.batch.rows * config.batch.accumulation
    first = Candidate(data, fsdp, 1, 1, 1, config.model.remat, config.model.attention)
    return first.with_rows(rows_a_device * first.split, update)


def with_kernel(candidate: Candidate, target: Target) -> Candidate:
    """The same with the attention kernel, where there is one that can be planned."""
    kernel = candidate.attention == "xla" and target.card.platform == "cuda"
    return dataclasses.replace(candidate, attention="pallas") if kernel else candidate


def less_memory(candidate: Candidate, update: int, target: Target) -> Iterator[Candidate]:
    """What to try where a candidate does not fit, the cheapest change first."""
    yield with_kernel(candidate, target)
    if candidate.rows_a_device > FEW_ROWS:
        yield candidate.with_rows(candidate.rows // 2, update)
    if candidate.remat in STRONGER:
        yield dataclasses.replace(candidate, remat=STRONGER[candidate.remat])
    if candidate.rows_a_device > 1:
        yield candidate.with_rows(candidate.rows // 2, update)
    if candidate.data % 2 == 0:
        yield dataclasses.replace(candidate, data=candidate.data // 2, fsdp=candidate.fsdp * 2)
    if candidate.fsdp % 2 == 0 and candidate.tensor < 8:
        smaller = dataclasses.replace(candidate, fsdp=candidate.fsdp // 2, tensor=candidate.tensor * 2)
        yield smaller.with_rows(max(candidate.rows // 2, smaller.split), update)


def search(
    config: TrainConfig,
    folder: Path,
    target: Target,
    measure: Measure,
    *,
    known: Candidate | None = None,
    only: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Everything that was tried, in order; `only`: the first alone. `known`: what was best for the model elsewhere.

    First the configuration as it is, where its mesh is one of the target, and `known`: what is first also with the
    attention kernel, where there is one. Down from there until something fits, then the best with the kernel, and up in
    rows while that fits and is worth it. An update keeps its size on as many devices as the configuration is for; on
    more it may grow.
    """
    update = config.batch.rows * config.batch.accumulation
    trials: list[Trial] = []

    def attempt(candidate: Candidate) -> Trial:
        tried = next((trial for trial in trials if trial.candidate == candidate), None)
        if tried is None:
            say(f"{target}: {describe(candidate)}")
            tried = Trial(candidate, measure(candidate.apply(config), folder), target.card.available)
            trials.append(tried)
        return tried

    own = own_candidate(config, target)
    if own and known:
        known = known.with_rows(min(known.rows, update), update)
    trial = attempt(own or (None if only else known) or on_target(config, target))
    if only:
        return trials
    if known:
        attempt(with_kernel(trial.candidate, target))
        trial = attempt(known)
    while recommend(trials) is None:
        following = next((c for c in less_memory(trial.candidate, update, target) if _untried(c, trials)), None)
        if following is None or "error" in trial.found:  # of which memory is none
            return trials
        trial = attempt(following)
    best = fastest(trials)
    best = fastest([best, attempt(with_kernel(best.candidate, target))])
    while best.candidate.rows_a_device < MOST_ROWS:
        following = best.candidate.with_rows(best.candidate.rows * 2, update)
        grown = (best.peak or 0) + best.found.get("bytes_temporaries", 0)
        if grown > target.card.available or (own and following.update > update):
            break
        before, best = best, fastest([best, attempt(following)])
        if best.mfu < WORTH * before.mfu:
            break
    return trials


def _untried(candidate: Candidate, trials: list[Trial]) -> bool:
    return all(trial.candidate != candidate for trial in trials)


def recommend(trials: list[Trial]) -> Trial | None:
    """The fastest that fits."""
    return max((trial for trial in trials if trial.fits), key=lambda trial: trial.mfu, default=None)


def fastest(trials: list[Trial]) -> Trial:
    """`recommend` where something fits."""
    best = recommend(trials)
    assert best is not None
    return best


def describe(candidate: Candidate) -> str:
    """A candidate in words."""
    mesh = " x ".join(f"{name} {size}" for name, size in candidate.mesh.items())
    rows = f"{candidate.rows} rows ({candidate.rows_a_device:g} a device) x {candidate.accumulation}"
    attention = "" if candidate.attention == "xla" else f", attention {candidate.attention}"
    return f"{mesh}, {rows}, remat {candidate.remat}{attention}"
