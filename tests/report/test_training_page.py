"""The page of a training's folder: what `csp train` wrote stands there, and nothing else is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_html import Node, points, read_page

from csp_jax.errors import UserError
from csp_jax.report import build_any_report, build_report

LOSSES = [4.0, 2.0, 1.0, 0.5, 0.25]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "llava-7b-sft"
    run.mkdir()
    lines = [
        {"step": number + 1, "loss": loss, "grad_norm": 2 * loss, "skipped": 0.0, "counts": {"pairs": 3 * (number + 1)}}
        for number, loss in enumerate(LOSSES)
    ]
    lines[1]["reward"] = 0.5  # not of every line
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("seed: 1\nprompts: <my prompts>\n")
    (run / "versions.json").write_text(json.dumps({"jax": "0.10.2", "processes": 4}))
    plan = {"devices": 8, "mesh": {"data": 2, "fsdp": 4}, "parameters": 7_063_427_072, "bytes_parameters": 3 * 2**30}
    (run / "plan.json").write_text(json.dumps(plan))
    for step in ("4", "12", "5.partial"):
        (run / "checkpoints" / step).mkdir(parents=True)
    return run


def cells(page: Node, label: str) -> dict[str, list[str]]:
    rows = page.one("div", aria_label=label).all("tr")
    return {row.own("th")[0].text: [cell.text for cell in row.own("td")] for row in rows if row.own("td")}


def test_what_the_folder_holds_is_on_the_page(folder):
    page = read_page(build_any_report(folder))
    assert page.one("p", class_="headline").text == "5 updates, not finished."
    mean = np.mean(LOSSES)
    assert cells(page, "Metrics") == {
        "loss": ["4", "0.25", f"{mean:.4g}", "5"],
        "grad_norm": ["8", "0.5", f"{2 * mean:.4g}", "5"],
        "reward": ["0.5", "0.5", "0.5", "1"],
        "skipped": ["0", "0", "0", "5"],
    }
    assert cells(page, "Counts") == {"pairs": ["15"]}
    assert cells(page, "Layout") == {
        "devices": ["8"],
        "mesh": ["data 2, fsdp 4"],
        "parameters": ["7,063,427,072"],
        "bytes_parameters": ["3.00 GiB a device"],
    }
    assert cells(page, "Versions") == {"jax": ["0.10.2"], "processes": ["4"]}
    run = page.one("section", id="run")
    assert "Checkpoints: 4, 12." in run.text
    assert "<my prompts>" in run.one("pre").text
    (folder / "model").mkdir()
    assert read_page(build_any_report(folder)).one("p", class_="headline").text == "5 updates, finished."


def test_the_curves_are_the_metrics(folder):
    """What changes is drawn, to scale."""
    page = read_page(build_any_report(folder))
    figures = page.all("figure", class_="loss")
    assert [figure.one("span", class_="name").text.lower() for figure in figures] == ["loss", "grad_norm"]
    corners = np.array(points(figures[0].one("path", class_="faint").attributes["d"]))
    assert np.ptp(np.diff(corners[:, 0])) < 0.2
    heights = (corners[:, 1] - corners[0, 1]) / (corners[-1, 1] - corners[0, 1])
    np.testing.assert_allclose(heights, (np.array(LOSSES) - 4) / (0.25 - 4), atol=0.01)


def test_metrics_alone_are_enough(folder):
    for name in ("config.yaml", "versions.json", "plan.json"):
        (folder / name).unlink()
    page = read_page(build_any_report(folder))
    assert [node.text for node in page.all("p", class_="absent")] == [
        f"There is no {name} in this folder." for name in ("plan.json", "config.yaml", "versions.json")
    ]


def test_what_cannot_be_read_is_named(folder, tmp_path):
    (folder / "plan.json").write_text("[1]")
    with pytest.raises(UserError, match=r"plan\.json"):
        build_any_report(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss"\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl.*line 1 is not JSON"):
        build_any_report(folder)
    with pytest.raises(UserError, match=r"results\.json"):
        build_any_report(tmp_path)


def test_results_come_first(folder, run):
    """A folder with results has its own page, whatever else lies in it."""
    (run.path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    assert build_any_report(run.path).read_text() == build_report(run.path).read_text()
