"""The command line: every configuration that ships, on small data of its real format; and the errors people see."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import prep_samples
import pytest
from prep_models import tiny_detector, tiny_sam
from prep_runs import records, tree

from csp_jax.errors import UserError
from csp_jax.world import WorldConfig, build
from data_prep.cli import Meter, split_arguments
from data_prep.config import load_prep_config
from data_prep.verify import verify

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "prep").glob("*.yaml"))
RULE = "keywords.model={name: rule}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def prep(*arguments: object, at: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "COLUMNS": "200"}
    command = [sys.executable, "-m", "data_prep.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the configurations expect it: data/, checkpoints/ and the photographic world."""
    folder = tmp_path_factory.mktemp("place")
    for name, make in prep_samples.BUILDERS.items():
        make(folder / "data" / name)
    tiny_detector(folder / "checkpoints" / "grounding-dino")
    tiny_sam(folder / "checkpoints" / "sam")
    build(WorldConfig(statistics_scenes=100), folder / "shards" / "photo-world", {"train": 3})
    return folder


@pytest.mark.slow
def test_every_configuration_prepares_its_source(place):
    """`csp-prep run configs/prep/*.yaml` as it stands, but keywords by rule: SmolLM2 has a test of its own."""
    settings = [RULE]
    # a random detector's boxes may have any shape
    loose = ["localize.least_area=0", "localize.most_area=1", "run.progress=false"]
    done = prep("run", *CONFIGS, *settings, *loose, "--verify", "--json", at=place)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["config"]) for line in lines] == CONFIGS
    for line in lines:
        totals = line["totals"]
        assert totals["records"] > 0, line
        assert totals["rows"] == totals["questions"] + totals["rejected"] + totals["merged"]
        assert verify(place / line["out"])["records"] == totals["records"]
    materialized = next(line["totals"] for line in lines if "materialized" in line["out"])
    assert materialized["items"] == 11 * materialized["questions"]
    before = tree(place / "shards")
    again = prep("run", *CONFIGS, *settings, *loose, at=place)
    assert again.stdout.count("was finished before") == len(CONFIGS)
    assert tree(place / "shards") == before


def test_the_photographic_world_through_the_stage(place):
    done = prep("run", ROOT / "configs/prep/photographs.yaml", "out=grabcut", RULE, at=place)
    assert "finished" in done.stdout
    world, cut = records(place / "shards" / "photo-world"), records(place / "grabcut")
    assert [len(record.items) for record in cut] == [len(record.items) for record in world]
    asked = [{item.question for item in record.items} for record in cut]
    assert asked == [{item.question for item in record.items} for record in world]
    assert all(record.regions for record in cut)


def test_keywords_are_tried_out_without_pictures(place):
    bare = place / "bare"
    shutil.copytree(place / "data" / "pope", bare, ignore=shutil.ignore_patterns("val2014"))
    done = prep("keywords", ROOT / "configs/prep/pope.yaml", f"source.root={bare}", RULE, "--json", at=place)
    found = json.loads(done.stdout)
    assert (found["different questions"], found["keyword_found"]) == (4, 4)
    assert [answer["keyword"] for answer in found["answers"]][:2] == ["plate", "fork"]
    limited = prep("keywords", ROOT / "configs/prep/pope.yaml", f"source.root={bare}", RULE, "--limit=1", at=place)
    assert "Is there a plate" in limited.stdout
    assert "fork" not in limited.stdout


def test_a_dry_run_estimates_and_writes_nothing(place):
    before = tree(place / "data")
    done = prep("run", ROOT / "configs/prep/folder.yaml", "out=dry", "--dry-run", "--json", at=place)
    found = json.loads(done.stdout)
    assert (found["rows"], found["units"], found["units tried"]) == (3, 3, 3)
    assert found["gigabytes"] > 0
    assert found["hours, at most (one after another)"] >= found["hours, at least (slowest stage)"] > 0
    assert not (place / "dry").exists()
    assert tree(place / "data") == before


def test_a_run_says_what_it_did_and_verify_agrees(place):
    done = prep("run", ROOT / "configs/prep/amber.yaml", "out=said", RULE, "localize.detector={name: annotations}",
                "--limit", "5", at=place)  # fmt: skip
    assert "5 rows = 4 questions packed + 1 rejected + 0 merged" in done.stdout
    assert "no_answer" in done.stdout
    assert "all holds" in prep("verify", "said", at=place).stdout
    (place / "said" / "rejects.jsonl").unlink()
    broken = prep("verify", "said", at=place, check=False)
    assert broken.returncode == 2


def test_a_terminal_sees_a_bar_with_rate_time_left_and_drops(place):
    ours, theirs = pty.openpty()
    arguments = [
        "run",
        str(ROOT / "configs/prep/amber.yaml"),
        "out=seen",
        RULE,
        "localize.detector={name: annotations}",
    ]
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.cli", *arguments], cwd=place, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # what the other end of a closed terminal raises
        while data := os.read(ours, 4096):
            seen += data
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(r"amber \S+ +7/7 [\d.]+/s +\d+:\d\d:\d\d +1 dropped \(no_answer 1\)", text)


def test_a_log_gets_lines_with_rate_time_left_and_drops(capsys, monkeypatch):
    times = iter([0.0, 40.0, 50.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    totals = Counter({"rejected": 3, "rejected.no_object": 2, "rejected.gray_image": 1})
    meter = Meter("rlaifv", 7300, shown=True)
    for rows in (100, 140, 150, 300):  # 100 of an earlier run; two a second
        meter(rows, totals if rows > 140 else Counter())
    assert capsys.readouterr().err.splitlines() == [
        "rlaifv: 140 of 7300 rows, 1.0/s, 2.0 h left",
        "rlaifv: 300 of 7300 rows, 2.0/s, 1.0 h left, 3 dropped (no_object 2, gray_image 1)",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run"], "Missing argument"),
        (["run", "none.yaml"], "none.yaml"),
        (["run", "folder.yaml", "pack.colour=1"], "pack.colour"),
        (["run", "folder.yaml", "source.name=photos"], "source"),
        (["run", "folder.yaml", "source.depth=3"], "source.depth"),
        (["run", "folder.yaml", "localize.most_area=2"], "localize.most_area"),
        (["run", "folder.yaml", "pack.splits={train: 0.5}"], "add up to 0.5"),
        (["run", "folder.yaml", "source.root=nowhere"], "nowhere"),
        (["run", "folder.yaml", "something"], "something"),
        (["run", "folder.yaml", "folder.yaml"], "two configurations write there"),
        (["run", "folder.yaml", "segment.model={name: sam, checkpoint: gone.pth}"], "gone.pth"),
        (["run", "folder.yaml", "segment.model={name: sam, checkpoint: data, device: cuda:7}"], "device"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(place, arguments, problem):
    shutil.copy(ROOT / "configs/prep/folder.yaml", place / "folder.yaml")
    done = prep(*arguments, at=place, check=False)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    if problem != "Missing argument":
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_valid_and_write_to_places_of_their_own(file):
    config = load_prep_config(file)
    others = [load_prep_config(other).out for other in CONFIGS if other != file]
    assert config.out not in others


def test_arguments_are_files_or_settings():
    assert split_arguments(["a.yaml", "b=1", "c.yml", "out=x.yaml"]) == (
        [Path("a.yaml"), Path("c.yml")],
        ["b=1", "out=x.yaml"],
    )
    with pytest.raises(UserError, match="no configuration"):
        split_arguments(["b=1"])


def test_bench_measures():
    from data_prep.benchmark import modes, packing_speed, spaces

    assert packing_speed(records=20)["MB/s"] > 0
    compared = modes(pictures=1)
    assert compared["materialized as png, times the bytes"] > compared["materialized as jpeg, times the bytes"] > 11
    left = [row["noise left"] for row in spaces()]
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(1, abs=0.02)
