"""Ray's workers do what the stages of this process do, also when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import prep_samples
import pytest
from prep_runs import config_of, lines, start, tree

import data_prep.run
from csp_jax.errors import UserError
from data_prep.ledger import LEDGER
from data_prep.pack import WORK
from data_prep.run import prepare
from data_prep.verify import verify

pytest.importorskip("ray", reason="ray is not installed: make test-sam runs this")

SEGMENT = {"model": {"name": "grabcut", "iterations": 8}}
COMMON: dict[str, Any] = {
    "batch": 2,
    "segment": SEGMENT,
    "pack": {"records_per_shard": 7, "splits": {"train": 0.8, "test": 0.2}},
}
WORKERS = {"engine": "ray", "workers": 2, "cpus": 0.5, "progress": False, "threads": 1}


def source_of(root: Path, count: int) -> None:
    """`count` pictures with a box each; every fifth row is bad."""
    root.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        (root / f"{number}.jpg").write_bytes(prep_samples.jpeg_bytes(number))
        row = {"image": f"{number}.jpg", "question": "Is there a ball here?", "answer": "yes"}
        rows.append(
            row | {"regions": [{"box": list(prep_samples.BOX)}]} | ({"question": ""} if number % 5 == 2 else {})
        )
    prep_samples.write_lines(root / "questions.jsonl", rows)


def run(folder: Path, out: str, way: dict[str, Any], progress: Any = None) -> Any:
    config = config_of("folder", folder / "source", folder / out, **COMMON, run=way)
    return prepare(config, progress=progress)


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path, monkeypatch):
    """Both workers are killed, one after the other; the data set is that of a run without ray, byte for byte."""
    source_of(tmp_path / "source", 60)
    plain = run(tmp_path, "plain", {"progress": False, "threads": 1})
    engines = []
    opened = data_prep.run.open_engine
    monkeypatch.setattr(data_prep.run, "open_engine", lambda config: engines.append(opened(config)) or engines[-1])
    killed: set[int] = set()

    def kill(rows: int, totals: Counter[str]) -> None:
        fresh = engines[0].processes - killed
        if len(killed) < 2 and rows >= 8 + 20 * len(killed) and fresh:
            killed.add(min(fresh))
            os.kill(min(fresh), signal.SIGKILL)

    done = run(tmp_path, "ray", WORKERS, kill)
    assert len(killed) == 2
    assert len(engines[0].processes) == 4
    assert done.totals == plain.totals
    assert tree(tmp_path / "ray") == tree(tmp_path / "plain")
    assert verify(tmp_path / "ray")["rows"] == 60


def test_an_interrupted_run_goes_on_with_another_engine(tmp_path):
    source_of(tmp_path / "source", 24)

    def stop(rows: int, totals: Counter[str]) -> None:
        if rows >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "out", {"progress": False, "threads": 1}, stop)
    done = run(tmp_path, "out", WORKERS)
    assert done.resumed > 0
    run(tmp_path, "plain", {"progress": False, "threads": 1})
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """This process is killed with its cluster; the second one of ray's makes the same as one without ray."""
    source, out = tmp_path / "source", tmp_path / "out"
    source_of(source, 60)
    run(tmp_path, "plain", {"progress": False, "threads": 1})
    settings = json.dumps({**COMMON, "run": WORKERS})
    process = start("run", source, out, settings)
    while lines(out / WORK / LEDGER) < 25 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "finished before it could be killed"
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    assert start("run", source, out, settings).wait() == 0
    assert tree(out) == tree(tmp_path / "plain")
    assert verify(out)["rows"] == 60


def test_a_cluster_of_two_nodes_that_others_started(tmp_path, monkeypatch):
    """`run.address`: both nodes work, from another folder too, and the cluster is still there afterwards."""
    from ray.cluster_utils import Cluster

    source_of(tmp_path / "source", 24)
    run(tmp_path, "plain", {"progress": False, "threads": 1})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.chdir(tmp_path)
        done = run(Path(), "out", {**WORKERS, "cpus": 1.0, "address": cluster.address})
        assert done.totals["rows"] == 24
        assert tree(tmp_path / "out") == tree(tmp_path / "plain")
        assert len(cluster.list_all_nodes()) == 2
    finally:
        cluster.shutdown()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_lost_host_loses_and_doubles_nothing(tmp_path, monkeypatch):
    """A host dies with what its worker has done and not handed over; another one, idle until then, takes its place."""
    from ray.cluster_utils import Cluster

    source_of(tmp_path / "source", 40)
    plain = run(tmp_path, "plain", {"progress": False, "threads": 1})
    engines = []
    opened = data_prep.run.open_engine
    monkeypatch.setattr(data_prep.run, "open_engine", lambda config: engines.append(opened(config)) or engines[-1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(2)]
        lost = []

        def lose(rows: int, totals: Counter[str]) -> None:
            if rows < 10 or lost:
                return
            working = {parent_of(process) for process in engines[0].processes}
            lost.extend(node for node in others if node.all_processes["raylet"][0].process.pid in working)
            if lost:
                cluster.remove_node(lost[0], allow_graceful=False)

        done = run(tmp_path, "out", {**WORKERS, "cpus": 1.0, "address": cluster.address}, lose)
        assert lost
        assert done.totals == plain.totals
        assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    finally:
        cluster.shutdown()


def test_what_a_worker_cannot_do_is_one_clear_line(tmp_path):
    source_of(tmp_path / "source", 2)
    model = {"name": "sam", "checkpoint": str(tmp_path / "gone.pth")}
    config = config_of("folder", tmp_path / "source", tmp_path / "out", segment={"model": model}, run=WORKERS)
    with pytest.raises(UserError, match=r"gone\.pth"):
        prepare(config)
    with pytest.raises(UserError, match=r"run\.gpus"):
        run(tmp_path, "out", {**WORKERS, "gpus": 1.0})
