"""Runs a training in a process of its own: `python train_child.py CONFIG.yaml [STEP]`.

With a step, the process kills itself as soon as that step's checkpoint is on disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import Interrupted
from csp_jax.policy import batches_for
from csp_jax.train.checkpoint import Checkpoints
from csp_jax.train.loop import train

INTERRUPTED = 9


def die_after(last: int) -> None:
    """Let the checkpoint of step `last` be the last thing that this process does."""
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, *arguments: Any) -> None:
        save(self, step, *arguments)
        if step == last:
            self.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_after(int(sys.argv[2]))
    try:
        config = load_config(TrainConfig, Path(sys.argv[1]))
        train(config, batches=batches_for(config))
    except Interrupted as stop:
        print(stop)
        sys.exit(INTERRUPTED)
