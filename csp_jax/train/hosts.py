"""A run of several processes: how they find each other, stop together, and do not wait for one that is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
from flax import nnx
from jax.experimental import multihost_utils

from csp_jax.errors import Interrupted, UserError

Model = TypeVar("Model", bound=nnx.Module)
LOST = 76  # a process of the run is gone: start them all again, they go on from the last checkpoint
# What launchers set: how many processes there are. jax.distributed reads the rest itself.
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETIONS")


def join(heartbeat: int = 100) -> None:
    """Connect this process with the others of its run, if it was started as one of several.

    SLURM, Open MPI, Kubernetes jobs and TPU pods are recognized by jax.distributed; anywhere else CSP_COORDINATOR
    (host:port of process 0), CSP_PROCESSES and CSP_PROCESS say it. `heartbeat`: seconds after which a silent process
    counts as gone. UserError: a variable is missing or no number.
    """
    if jax.distributed.is_initialized():
        return
    if "CSP_COORDINATOR" in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            os.environ["CSP_COORDINATOR"],
            _number("CSP_PROCESSES"),
            _number("CSP_PROCESS"),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
        )
    elif any(os.environ.get(name, "1") not in ("", "1") for name in COUNTS) or _is_tpu_pod():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    with _nothing_printed():
        # CPU collectives wait long for a process that they know, but half a minute for a first one.
        wait_for_all("joined")


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """What libraries print goes to stderr: Gloo announces its connections where a command's rows belong."""
    sys.stdout.flush()
    printed = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(printed, 1)
        os.close(printed)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError("must be a number", field=name, value=text, mend="Set it for every process of the run")
    return int(text)


def _is_tpu_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def told_to_stop(step: int, received: int | None) -> bool:
    """Whether to stop after this step: every process says the same, whichever of them was told."""
    if jax.process_count() == 1:
        return received is not None
    return multihost_utils.reached_preemption_sync_point(step)


def is_first() -> bool:
    """Whether this process writes what only one should write."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def own_folder(out: Path) -> Path:
    """Where this process writes what it alone knows: the run's folder itself, or `hosts/N` in it."""
    return out if is_first() else out / "hosts" / str(jax.process_index())


def whole(model: Model) -> Model:
    """A model with every leaf in this host's memory, where its devices hold parts only."""
    if jax.process_count() == 1:
        return model
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, multihost_utils.process_allgather(state, tiled=True))


@contextlib.contextmanager
def ending_together(waiting: Callable[[], str]) -> Iterator[None]:
    """Around what several processes do together: one that fails, or finds another one gone, ends at once with a
    message, so that none waits for it. `waiting` says for what it waited."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if jax.process_count() > 1:
            abandon(waiting(), error)
        raise


def leave() -> NoReturn:
    """End this process at once, without waiting for what does not come."""
    os._exit(LOST)


def abandon(waiting: str, error: Exception) -> NoReturn:
    """End this process at once with a message, for at its exit it would wait for one that is gone."""
    who = f"csp: process {jax.process_index()} of {jax.process_count()}"
    status = 2
    if isinstance(error, UserError):
        text = f"{who}: {error}"
    elif isinstance(error, jax.errors.JaxRuntimeError):
        status = LOST
        reason = next(iter(str(error).splitlines()), "")[:300]
        text = (
            f"{who} lost another one while waiting for {waiting} ({reason}). "
            "Start all processes again: they go on from what is saved"
        )
    else:
        traceback.print_exception(error)
        text = f"{who} failed while waiting for {waiting}"
    print(text, file=sys.stderr, flush=True)
    os._exit(status)


class StopSignal:
    """Turns SIGTERM and SIGINT into a request that the loop sees between two steps.

    Of several processes, jax.distributed takes SIGTERM and tells the others.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.received = number

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
