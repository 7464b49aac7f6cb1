"""Where the stages run: on ray's workers, many GPUs and many hosts. This process packs what one data set of Ray Data
gives back, in the order of the source.

A worker that is lost is started anew and its batches are sent again; a reader that is lost reads again from the
beginning. What comes back is counted, so that nothing is lost or doubled. Workers read the pictures themselves: their
paths must be the same on every host.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from csp_jax.errors import UserError
from data_prep.config import PrepConfig
from data_prep.engine import Clocks
from data_prep.unit import Unit

if TYPE_CHECKING:
    from data_prep.ray_dataset import Parcel


class RayEngine:
    """`run.workers` workers on a cluster (`run.address`), or on one that is started on this machine.

    UserError: ray is not installed, the cluster cannot be reached or lacks what the workers need, or a worker's own.
    """

    def __init__(self, config: PrepConfig):
        try:
            import ray
            import ray.data
        except ImportError:
            mend = "Install the `prep` extra, or set run.engine=local"
            raise UserError("ray is not installed", field="run.engine", value="ray", mend=mend) from None
        self._ray, self.config = ray, config
        self.processes: set[int] = set()  # the workers' that have given something back
        self._values = config.model_dump(mode="json")
        self._started = not ray.is_initialized()
        if self._started:
            self._start()
        try:
            self._check_resources()
            self.weights: dict[str, Any] = self._ask_for_weights()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        run = self.config.run
        here = {} if run.address else {"num_cpus": max(os.cpu_count() or 1, int(run.workers * run.cpus + 0.999))}
        try:
            self._ray.init(
                address=run.address or "local",
                include_dashboard=False,
                logging_level="error",
                log_to_driver=False,
                **here,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot be reached ({error})", field="run.address", value=run.address) from None
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is said by one line, ours

    def _check_resources(self) -> None:
        """Workers that the cluster has no room for would wait without a word."""
        there = self._ray.cluster_resources()
        run = self.config.run
        for name, kind, each in (("cpus", "CPU", run.cpus), ("gpus", "GPU", run.gpus)):
            if run.workers * each > there.get(kind, 0):
                raise UserError(
                    f"{run.workers} workers need {run.workers * each:g}, the cluster has {there.get(kind, 0):g}",
                    field=f"run.{name}",
                    value=each,
                    mend="Use fewer workers, or give each less",
                )

    def _ask_for_weights(self) -> dict[str, Any]:
        """Opened once in a process that ends again: a run that is finished already starts no worker."""
        from data_prep.ray_dataset import weights_of

        run = self.config.run
        options = {"num_cpus": run.cpus, "num_gpus": run.gpus, "max_calls": 1, "max_retries": run.retries}
        try:
            return self._ray.get(self._ray.remote(**options)(weights_of).remote(os.getcwd(), self._values))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise self._lost(error) from None

    def run(self, batches: Iterable[list[Unit]], clocks: Clocks) -> Iterator[list[Unit]]:
        """Every batch through a worker, in order; they are read up to `run.queue` + 1 for each worker ahead.

        `batches` is sent to the reader, which may go through it several times.
        """
        from data_prep.ray_dataset import Gate, Reader, dataset_of, parcel_of

        run = self.config.run
        options = {"num_cpus": 0, "label_selector": {"ray.io/node-id": self._ray.get_runtime_context().get_node_id()}}
        gate = self._ray.remote(**options)(Gate).remote(run.workers * (run.queue + 1))
        rows = dataset_of(Reader(batches, gate), run, self._values, self.weights)
        tables = iter(rows.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0))
        try:
            for count, parcel in enumerate(map(parcel_of, self._in_time(tables))):
                self._note(parcel, count, clocks)
                if parcel.end:
                    return
                yield parcel.batch
                gate.packed.remote(count + 1)
            raise RuntimeError("ray's data set ended before the source")
        finally:
            tables.close()
            self._ray.kill(gate)

    def _in_time(self, tables: Iterator[Any]) -> Iterator[Any]:
        """The same tables; what ray says of lost workers becomes a user's error."""
        try:
            yield from tables
        except self._ray.exceptions.RayError as error:
            raise self._lost(error) from None

    def _note(self, parcel: Parcel, count: int, clocks: Clocks) -> None:
        if parcel.error is not None:
            if isinstance(parcel.error, self._ray.exceptions.RayError):
                raise self._lost(parcel.error) from None
            raise parcel.error
        if parcel.number != count:
            raise RuntimeError(f"ray gave batch {parcel.number} in the place of batch {count}")
        if parcel.process:
            self.processes.add(parcel.process)
        for name, taken in parcel.seconds.items():
            clocks[name].seconds += taken
            clocks[name].units += len(parcel.batch)

    def _lost(self, error: Exception) -> UserError:
        """What ray itself could not mend, in one line."""
        (said, *_) = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
        mend = "See to it and run the same command again"
        return UserError(f"ray could not go on ({said})", field="run.engine", value="ray", mend=mend)

    def close(self) -> None:
        """End the cluster if it was started here, or leave the one that was reached."""
        if self._started:
            self._ray.shutdown()
