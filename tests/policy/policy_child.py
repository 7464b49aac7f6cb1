"""Runs a GRPO training in a process of its own: `python policy_child.py CONFIG.yaml [STEP]`.

With a step, the process kills itself as soon as that step's checkpoint is on disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "train"):
    sys.path.insert(0, str(folder))

from policy_ground import chance  # noqa: E402
from train_child import die_after  # noqa: E402

from csp_jax.config import TrainConfig, load_config  # noqa: E402
from csp_jax.policy import batches_for  # noqa: E402
from csp_jax.rewards import REWARDS  # noqa: E402
from csp_jax.train.loop import train  # noqa: E402

if __name__ == "__main__":
    REWARDS["exact"] = chance
    if len(sys.argv) > 2:
        die_after(int(sys.argv[2]))
    run = load_config(TrainConfig, Path(sys.argv[1]))
    train(run, batches=batches_for(run))
