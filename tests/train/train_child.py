"""Runs a training in a process of its own: `python train_child.py CONFIG.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import Interrupted
from csp_jax.train.loop import train

INTERRUPTED = 9

if __name__ == "__main__":
    try:
        train(load_config(TrainConfig, Path(sys.argv[1])))
    except Interrupted as stop:
        print(stop)
        sys.exit(INTERRUPTED)
