"""The page as a whole: sections, self-containment, what is left out, and what a bad run folder says."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_folder import LEVELS, RunFolder
from report_html import read_page

from csp_jax.errors import UserError
from csp_jax.report import build_report
from csp_jax.report.page import duration

SECTIONS = ["glance", "results", "reliability", "roc", "direct", "strip", "losses", "conventions"]
SECTIONS += ["numbers", "run"]


def test_every_section_is_there_in_order_and_linked(run: RunFolder) -> None:
    target = build_report(run.path)
    assert target == run.path / "report" / "index.html"
    assert target.stat().st_size < 4_000_000
    page = read_page(target)
    assert [section.attributes["id"] for section in page.all("section")] == SECTIONS
    assert [link.attributes["href"] for link in page.one("nav").all("a")] == [f"#{name}" for name in SECTIONS]
    absent = [node.text for node in page.all("p", class_="absent")]
    assert absent == ["results.json holds no paired differences from the base (metrics “delta_…”)."]


def test_nothing_is_fetched_from_elsewhere(run: RunFolder) -> None:
    target = build_report(run.path)
    text = target.read_text()
    assert not re.search(r"(?i)https?:|url\(|@import|<script|<iframe|<object", text)
    for node in read_page(target).walk():
        for name in ("src", "href", "srcset", "xlink:href", "data", "poster"):
            assert re.match(r"#\w|data:", node.attributes.get(name, "#ok"))


def test_pictures_are_the_files_of_the_run(run: RunFolder) -> None:
    section = read_page(build_report(run.path)).one("section", id="strip")
    pictures = section.all("img")
    assert len(pictures) == len(LEVELS)
    for picture, level in zip(pictures, LEVELS):
        data = base64.b64decode(picture.attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
        shown = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(run.path / "strip" / f"{level}.png")))


def test_the_strip_says_what_each_model_said(run: RunFolder) -> None:
    section = read_page(build_report(run.path)).one("section", id="strip")
    assert "“Is there a <cup> & a spoon?” The truth: yes." in section.text
    base, trained = section.one("tbody").own("tr")
    assert base.one("th").text == "Base"
    assert [cell.text for cell in base.own("td")] == ["yes 93% no 95%"] * 3
    assert trained.one("th").text == "SFT + SimPO (evidence)"
    assert [cell.text for cell in trained.own("td")] == ["yes 100% no –", "yes 50% no –", "yes 0% no –"]
    assert trained.attributes["class"] == "m-evidence-sft-simpo"


def test_configuration_versions_times_and_notes(run: RunFolder) -> None:
    page = read_page(build_report(run.path))
    section = page.one("section", id="run")
    assert "resolution: 64" in section.one("pre").text
    assert "jax 0.10.2" in section.text
    assert "Time by stage: 3 min 17 s in all" in section.text
    assert "Machine: cores 2, memory 8 GB. Seed: 0." in section.text
    assert page.one("header").one("ul", class_="notes").text == "A fraction of the data."
    assert "95% intervals, 200 bootstrap resamples of images" in page.one("section", id="results").text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_with_results_alone_says_what_is_missing(run: RunFolder) -> None:
    run.rows = [row for row in run.rows if row["model"] == "base" and not row["metric"].startswith("direct")]
    run.save_rows()
    for name in ("predictions", "train", "strip"):
        shutil.rmtree(run.path / name)
    for name in ("run.json", "strip.json"):
        (run.path / name).unlink()
    page = read_page(build_report(run.path))
    assert [section.attributes["id"] for section in page.all("section")] == SECTIONS
    for name in ("reliability", "roc", "direct", "strip", "losses", "run"):
        assert page.one("section", id=name).all("p", class_="absent"), name
    assert not page.all("figure")
    assert "results.json holds no ablations or controls." in page.one("section", id="results").text
    assert "The base model's mean calibration error" in page.one("header").text
    assert page.one("h1").text == "Calibration report of the run small"


def test_names_from_the_run_cannot_become_markup(run: RunFolder) -> None:
    run.change("run.json", lambda content: content.update(name="<img src=x onerror=alert(1)>"))
    page = read_page(build_report(run.path))
    assert "<img src=x onerror=alert(1)>" in page.one("h1").text
    assert len(page.all("img")) == len(LEVELS)


def test_a_failed_build_leaves_the_page_before_it_whole(run: RunFolder) -> None:
    before = build_report(run.path).read_text()
    (run.path / "strip" / "50.png").write_bytes(b"not a picture")
    with pytest.raises(UserError):
        build_report(run.path)
    assert (run.path / "report" / "index.html").read_text() == before
    assert [path.name for path in (run.path / "report").iterdir()] == ["index.html"]


def _row(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[4].update(fields)


@pytest.mark.parametrize(
    ("file", "edit", "field", "words"),
    [
        ("results.json", _row(value="0.5"), "[4].value", "must be a number"),
        ("results.json", _row(value=43.0), "[4].value", "fractions, not percents"),
        ("results.json", _row(low=0.5, high=0.4), "[4].low", "must not exceed"),
        ("results.json", _row(n=-1), "[4].n", "at least 0"),
        ("results.json", _row(seed=1.5), "[4].seed", "whole number"),
        ("results.json", _row(metric="ties", value=0.25), "[4].value", "whole number"),
        ("results.json", lambda rows: rows[4].pop("split"), "[4].split", "is missing"),
        (
            "run.json",
            lambda run: run["conventions"].update(preset="guo"),
            "conventions.preset",
            "csp-classwise",
        ),
        ("run.json", lambda run: run["conventions"].update(bins=0), "conventions.bins", "at least 1"),
        ("run.json", lambda run: run["stages"][1].update(seconds=-2), "stages[1].seconds", "must lie in"),
        ("run.json", lambda run: run.update(notes="a"), "notes", "list"),
        ("strip.json", lambda s: s["levels"][1].update(image="../a.png"), "levels[1].image", "outside"),
        ("strip.json", lambda s: s["levels"][1].update(image="strip/9.png"), "levels[1].image", "picture"),
        (
            "strip.json",
            lambda s: s["levels"][2]["says"]["base"].update(yes=93),
            "levels[2].says.base.yes",
            "[0, 1]",
        ),
        ("strip.json", lambda s: s.update(levels=[]), "levels", "at least one"),
    ],
)
def test_bad_fields_are_named(run: RunFolder, file: str, edit: Callable[[Any], Any], field: str, words: str) -> None:
    run.change(file, lambda content: edit(content) and None)
    with pytest.raises(UserError) as caught:
        build_report(run.path)
    assert caught.value.field == field
    assert Path(caught.value.file).name == file
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", "not json"])
def test_results_must_be_a_list_of_rows(run: RunFolder, text: str) -> None:
    (run.path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        build_report(run.path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_of_metrics_is_named(run: RunFolder) -> None:
    file = run.path / "train" / "paper-sft" / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        build_report(run.path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"confidence": np.full((180, 2), 93.0)}, "confidence"),
        ({"confidence": np.zeros((180, 3))}, "confidence"),
        ({"confidence": np.zeros((180, 2), int)}, "confidence"),
        ({"truth": np.full(180, 2)}, "truth"),
        ({"split_mask": np.ones((180, 4), bool)}, "split_mask"),
        ({"image_id": np.zeros(3)}, "image_id"),
    ],
)
def test_bad_predictions_are_named(run: RunFolder, change: dict[str, np.ndarray], field: str) -> None:
    file = run.path / "predictions" / "sft-evidence.npz"
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, **change})
    with pytest.raises(UserError) as caught:
        build_report(run.path)
    assert (caught.value.file, caught.value.field) == (file, field)


def test_missing_arrays_and_truncated_files_are_named(run: RunFolder) -> None:
    file = run.path / "predictions" / "sft-evidence.npz"
    whole = file.read_bytes()
    np.savez(file, **{name: array for name, array in np.load(file).items() if name != "truth"})
    with pytest.raises(UserError, match="truth: the array is missing"):
        build_report(run.path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as an npz file"):
        build_report(run.path)


def test_null_values_are_dashes(run: RunFolder) -> None:
    run.row("base", "", "random", "auc_correctness").update(value=None, low=None, high=None)
    run.save_rows()
    page = read_page(build_report(run.path))
    cells = page.one("section", id="results").all("tr", data_name="Base")[0].own("td")
    assert cells[2].text == "–"
    assert "nan" not in json.dumps([cell.text for cell in page.all("td")])
