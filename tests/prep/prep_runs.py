"""Runs of the preparation over the samples, and what they left on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import prep_samples

from csp_jax.manifest import open_shard
from csp_jax.records import Record, decode, read_manifest
from data_prep.config import PrepConfig
from data_prep.run import Prepared, prepare

HERE = Path(__file__).parent
SOURCES: dict[str, dict[str, Any]] = {
    "rlaifv": {"name": "rlaifv"},
    "pope": {"name": "pope"},
    "amber": {"name": "amber"},
    "coco": {"name": "coco"},
    "vqav2": {"name": "vqa", "questions": "v2_OpenEnded_*.json", "annotations": "v2_mscoco_*.json"},
    "okvqa": {"name": "vqa", "questions": "OpenEnded_*.json", "annotations": "mscoco_*.json", "coefficients": "OK-VQA"},
    "gqa": {"name": "gqa", "scene_graphs": "val_sceneGraphs.json"},
    "textvqa": {"name": "textvqa"},
    "ocrvqa": {"name": "ocrvqa", "splits": [1]},
    "sharegpt4v": {"name": "conversations", "file": "*.json"},
    "folder": {"name": "folder"},
}


def config_of(source: str, root: Path, out: Path, /, **settings: Any) -> PrepConfig:
    """A configuration without any weights: rule, annotations or the whole picture, boxes as masks."""
    values: dict[str, Any] = {
        "dataset": source,
        "out": str(out),
        "source": {**SOURCES[source], "root": str(root)},
        "localize": {"nothing": "whole"},
        "segment": {"model": {"name": "boxes"}},
        "run": {"progress": False, "threads": 1},
    }
    return PrepConfig.model_validate({**values, **settings})


def prepared(source: str, folder: Path, /, **settings: Any) -> Prepared:
    """Build a source's sample below `folder` and prepare it."""
    if not (folder / source).exists():
        prep_samples.BUILDERS[source](folder / source)
    return prepare(config_of(source, folder / source, folder / "out", **settings))


def records(directory: Path, split: str = "train") -> list[Record]:
    """All records of a split."""
    manifest = read_manifest(directory)
    found = []
    for shard in manifest.split(split).shards:
        reader = open_shard(directory, shard)
        found += [decode(data) for data in reader.read_all()]
        reader.close()
    return found


def rejects(directory: Path) -> list[dict[str, str]]:
    """The lines of rejects.jsonl."""
    return [json.loads(line) for line in (directory / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def start(*arguments: object) -> subprocess.Popen:
    """`prep_child.py` with these arguments, in a process of its own."""
    environment = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(HERE / "prep_child.py"), *map(str, arguments)], env=environment)


def lines(path: Path) -> int:
    """Finished lines of a file; 0 when it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
