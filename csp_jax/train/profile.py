"""A trace of some updates, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

from csp_jax.config import ProfileConfig


class ProfileWindow:
    """Traces this process and its devices from where the first update of the window starts until the metrics of the
    last one are here; nothing waits for it. A run that goes on within the window traces what is left of it."""

    def __init__(self, config: ProfileConfig | None, directory: Path):
        """`directory`: what is this process's in the run's folder."""
        self._updates = range(config.start, config.start + config.steps) if config else range(0)
        self._directory = directory / "tensorboard"
        self._tracing = False

    def before(self, step: int) -> None:
        """An update is about to start."""
        if not self._tracing and step in self._updates:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int) -> None:
        """The metrics of an update are here."""
        if self._tracing and step >= self._updates[-1]:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        self._updates = range(0)
        jax.profiler.stop_trace()

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracing:
            self._stop()
