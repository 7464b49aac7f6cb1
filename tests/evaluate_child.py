"""One of several hosts of an evaluation: `python evaluate_child.py PORT HOSTS HOST FOLDER LIMIT OUT.npz`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from csp_jax.config import ParallelConfig
from csp_jax.data.shards import ShardSource
from csp_jax.evaluate import Scorer, evaluate
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model
from csp_jax.scenes import open_scenes
from csp_jax.sharding import make_mesh
from csp_jax.text import Prompts

if __name__ == "__main__":
    port, hosts, host, folder, limit, out = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", num_processes=int(hosts), process_id=int(host))
    checkpoint = Path(folder) / "checkpoint"
    source = ShardSource(Path(folder) / "world", "test")
    scenes = open_scenes(open_family(checkpoint), Prompts(), source, limit=int(limit))
    mesh = make_mesh(ParallelConfig(), jax.local_devices())
    answers = evaluate(Scorer(load_model(checkpoint), mesh), scenes, rows=2)
    answers.save(Path(out))
