"""Every family against the numbers of its original, and the comparison itself: it finds what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_folders import FAMILIES, unpack
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from csp_jax.cli import app
from csp_jax.parity.checks import Check, parity

CASES = {
    "llava": {"px0": "pixels", "px1": "pixels", "single": "greedy", "text_only": "greedy"},
    "qwen2_vl": {
        "img0": "pixels",
        "img1": "pixels",
        "img2": "pixels",
        "single": "greedy",
        "batch_leftpad": "greedy",
        "text_only": "greedy",
    },
    "internvl2": {
        "img0": "pixels",
        "img1": "pixels",
        "img2": "pixels",
        "single": "greedy",
        "two_images": "greedy",
        "text_only": "logits",
        "text_ntk_maxpos16": "logits",
    },
    "phi3_vision": {
        "img0": "pixels",
        "img1": "pixels, every 7th",
        "img2": "pixels, every 7th",
        "crossing_short_to_long": "greedy",
        "text_only": "greedy",
    },
    "qwen_vl": {"img0": "pixels", "img1": "pixels", "two_images_ntk": "greedy", "text_only": "greedy"},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_its_original(family, tmp_path):
    checks = parity([unpack(FAMILIES[family], tmp_path)])
    wrong = [check for check in checks if not check.passed]
    assert not wrong
    made = {(check.case, check.what) for check in checks if check.difference is not None}
    assert {("", "import"), ("", "export"), ("", "adapter"), ("", "adapter, merged"), *CASES[family].items()} <= made
    assert {check.family for check in checks} == {family}


# --- what is wrong is found, case by case --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest case of a family."""
    whole = unpack("qwen2_vl", tmp_path)
    cases = json.loads((whole / "cases.json").read_text())
    (whole / "cases.json").write_text(json.dumps({name: cases[name] for name in ("img1", "text_only")}))
    return whole


def edit(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def verdicts(checks: list[Check]) -> dict[tuple[str, str], bool]:
    return {(check.case, check.what): check.passed for check in checks}


def test_a_wrong_reference_is_found_where_it_is(folder):
    assert all(verdicts(parity([folder])).values())
    edit(folder / "text_only.safetensors", lambda tensors: tensors["logits"].__iadd__(np.float32(2e-4)))
    found = verdicts(parity([folder]))
    assert [name for name, passed in found.items() if not passed] == [("text_only", "logits")]


def test_wrong_weights_pixels_and_tokens_are_found(folder):
    edit(folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].__imul__(np.float32(1.001)))
    edit(folder / "img1.safetensors", lambda tensors: tensors["pixel_values"].__setitem__((3, 7), 5.0))
    edit(folder / "text_only.safetensors", lambda tensors: tensors["generated"].__setitem__((0, 11), 0))
    found = verdicts(parity([folder]))
    wrong = {name for name, passed in found.items() if not passed}
    assert wrong == {("img1", "pixels"), ("text_only", "logits"), ("text_only", "greedy")}


def test_another_number_of_views_is_found(folder):
    edit(folder / "img1.safetensors", lambda t: t.update(pixel_values=np.ascontiguousarray(t["pixel_values"][:-4])))
    assert not verdicts(parity([folder]))["img1", "views"]


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["parity", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_the_command_says_what_differs_and_fails(folder, tmp_path):
    status, text = run(folder, "--json")
    rows = json.loads(text)
    assert status == 0
    assert {row["verdict"] for row in rows} == {"ok"}
    logits = next(row for row in rows if row["what"] == "logits")
    assert 0 < logits["difference"] < logits["limit"] == 1e-4

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    edit(other / "text_only.safetensors", lambda tensors: tensors["logits"].__iadd__(np.float32(1)))
    status, text = run(folder, other, "--json")
    assert status == 1
    differs = [(row["folder"], row["case"], row["what"]) for row in json.loads(text) if row["verdict"] == "differs"]
    assert differs == [("other", "text_only", "logits")]
    assert run(other)[0] == 1

    (other / "model.safetensors").unlink()
    status, text = run(other, "--json")
    (row,) = json.loads(text)
    assert (status, row["what"], row["verdict"]) == (1, "import", "differs")
    assert "no safetensors" in row["note"]


def test_the_table_shows_the_largest_differences(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    edit(other / "text_only.safetensors", lambda tensors: tensors["logits"].__iadd__(np.float32(1)))
    status, text = run(folder, other, "--markdown")
    assert status == 1
    head, _, first, second = text.strip().splitlines()
    assert head == "| folder | family | import | export | pixels | features | logits | greedy | LoRA |"
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:4] == ["qwen2_vl", "qwen2_vl", "exact", "exact"]
    assert cells[5] == "–"  # no case with features
    assert 0 < float(cells[6]) < 1e-4
    assert cells[7] == "exact"
    assert float(cells[8]) < 1e-5
    assert "| **1.0e+00** |" in second


def test_videos_are_named_as_skipped(folder):
    cases = json.loads((folder / "cases.json").read_text())
    cases["clip"] = {"videos": ["vid0"], "images": [], "tensors": {}}
    (folder / "cases.json").write_text(json.dumps(cases))
    (row,) = [check.row() for check in parity([folder]) if check.case == "clip"]
    assert row["verdict"] == "skipped"
    assert "videos" in row["note"]
