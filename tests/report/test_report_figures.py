"""The drawn points against numpy, scipy and scikit-learn, read back from the page's own SVG."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from report_folder import SPLITS, RunFolder
from report_html import Node, points, read_page
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from csp_jax.report import build_report
from csp_jax.report.drawing import Scale, moving_mean, round_steps, thinned

LEFT, SIDE, TOP = 26, 186, 6
NAMES = {
    "Base": "base-",
    "SFT + SimPO (paper)": "sft+simpo-paper",
    "SFT + SimPO (evidence)": "sft+simpo-evidence",
    "SFT (evidence)": "sft-evidence",
}


def across(x: float) -> float:
    return (x - LEFT) / SIDE


def up(y: float) -> float:
    return (TOP + SIDE - y) / SIDE


def pairs(run: RunFolder, name: str, split: str, preset: str) -> tuple[np.ndarray, np.ndarray]:
    """Whole percents and outcomes of one split, by the conventions as words: unreadable is 50%, and wrong."""
    chosen = run.mask[:, SPLITS.index(split)]
    percent, truth = 100 * run.confidence[name][chosen].astype(np.float64), run.truth[chosen]
    unreadable = np.isnan(percent).any(1)
    if preset == "csp-classwise":
        return np.rint(np.where(np.isnan(percent[:, 0]), 50, percent[:, 0])), truth == 0
    right = np.where(truth == 0, percent[:, 0] > percent[:, 1], percent[:, 1] > percent[:, 0])
    top = np.where(unreadable, 50, np.nan_to_num(percent).max(1))
    return np.rint(top), right & ~unreadable


def figure_of(page: Node, name: str, split: str) -> Node:
    row = page.one("section", id="reliability").one("div", data_name=name)
    return row.one("figure", data_split=split)


@pytest.mark.parametrize("preset", ["csp-classwise", "top-label"])
@pytest.mark.parametrize("bins", [10, 7])
def test_reliability_points_counts_bands_and_ece(run: RunFolder, preset: str, bins: int) -> None:
    run.change("run.json", lambda content: content["conventions"].update(preset=preset, bins=bins))
    page = read_page(build_report(run.path))
    for name, file in NAMES.items():
        for split in SPLITS:
            percent, outcome = pairs(run, file, split, preset)
            # (k/K, (k+1)/K], 0 in the first: whole-number arithmetic.
            index = np.maximum(-(-percent.astype(int) * bins // 100) - 1, 0)
            filled = np.unique(index)
            drawn = figure_of(page, name, split)
            circles, bands = drawn.all("circle"), drawn.all("line", class_="band")
            assert [int(c.attributes["data-bin"]) for c in circles] == filled.tolist()
            counts = [int(bar.attributes["data-count"]) for bar in drawn.all("rect", class_="count")]
            assert counts == [int((index == k).sum()) for k in filled]
            gap = 0.0
            for k, circle, band in zip(filled, circles, bands):
                inside = index == k
                stated, true = percent[inside].mean() / 100, outcome[inside].mean()
                gap += inside.mean() * abs(true - stated)
                assert across(float(circle.attributes["cx"])) == pytest.approx(stated, abs=1e-4)
                assert up(float(circle.attributes["cy"])) == pytest.approx(true, abs=1e-4)
                ends = binomtest(int(outcome[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
                assert up(float(band.attributes["y1"])) == pytest.approx(ends.low, abs=1e-4)
                assert up(float(band.attributes["y2"])) == pytest.approx(ends.high, abs=1e-4)
            printed = float(drawn.one("span", class_="note").text.removeprefix("ECE "))
            assert printed == pytest.approx(gap, abs=5.01e-4)


def test_the_base_is_repeated_behind_the_trained_models(run: RunFolder) -> None:
    page = read_page(build_report(run.path))
    base = figure_of(page, "Base", "popular")
    assert not base.all("path", class_="before")
    line = base.one("path", class_="line").attributes["d"]
    assert figure_of(page, "SFT + SimPO (paper)", "popular").one("path", class_="before").attributes["d"] == line
    featured = [row.attributes["data-name"] for row in page.one("section", id="reliability").all("div", class_="row")]
    assert featured == list(NAMES)


@pytest.mark.parametrize("which", ["correctness", "classwise"])
def test_roc_curves_and_areas(run: RunFolder, which: str) -> None:
    row = read_page(build_report(run.path)).one("section", id="roc").one("div", data_which=which)
    for split in SPLITS:
        figure = row.one("figure", data_split=split)
        lines, labels = figure.all("path", class_="line"), figure.all("text", class_="label")
        shown = {"base": "base-", "paper": "sft+simpo-paper", "evidence": "sft+simpo-evidence"}
        assert len(lines) == len(labels) == len(shown)
        for (name, file), line, text in zip(shown.items(), lines, labels):
            preset = "csp-classwise" if which == "classwise" else "top-label"
            score, label = pairs(run, file, split, preset)
            shown_name, area = text.text.split()
            assert shown_name == name
            assert float(area) == pytest.approx(roc_auc_score(label, score), abs=5.01e-4)
            false, true, _ = roc_curve(label, score, drop_intermediate=False)
            drawn = points(line.attributes["d"])
            np.testing.assert_allclose([across(x) for x, _ in drawn], false, atol=1e-4)
            np.testing.assert_allclose([up(y) for _, y in drawn], true, atol=1e-4)


def test_a_split_of_one_class_has_no_roc_curve(run: RunFolder) -> None:
    for file in (run.path / "predictions").glob("*.npz"):
        arrays = dict(np.load(file))
        arrays["truth"] = np.where(arrays["split_mask"][:, 4], 0, arrays["truth"])
        np.savez(file, **arrays)
    row = read_page(build_report(run.path)).one("section", id="roc").one("div", data_which="classwise")
    figure = row.one("figure", data_split="relation")
    assert [text.text for text in figure.all("text", class_="label")] == ["base –", "paper –", "evidence –"]


def test_other_seeds_are_thin_lines(run: RunFolder) -> None:
    folder = run.path / "predictions"
    (folder / "sft+simpo-evidence.npz").rename(folder / "sft+simpo-evidence-seed2.npz")
    (folder / "sft-evidence.npz").rename(folder / "sft+simpo-evidence-seed1.npz")
    section = read_page(build_report(run.path)).one("section", id="reliability")
    assert "seed 1 in full, 1 more as thin lines" in section.text
    drawn = section.one("div", data_name="SFT + SimPO (evidence)").one("figure", data_split="random")
    assert len(drawn.all("path", class_="faint")) == 1
    percent, outcome = pairs(run, "sft-evidence", "random", "csp-classwise")
    first = outcome[np.maximum(-(-percent.astype(int) // 10) - 1, 0) == 0]
    assert up(float(drawn.all("circle")[0].attributes["cy"])) == pytest.approx(first.mean(), abs=1e-4)


def test_figures_that_disagree_with_results_are_said_to(run: RunFolder) -> None:
    folder = run.path / "predictions"
    for split in SPLITS:
        percent, outcome = pairs(run, "base-", split, "csp-classwise")
        index = np.maximum(-(-percent.astype(int) // 10) - 1, 0)
        ece = sum(abs((outcome[index == k] - percent[index == k] / 100).sum()) for k in range(10)) / len(index)
        run.row("base", "", split, "ece").update(value=ece, low=0.0, high=1.0)
    for file in folder.iterdir():
        if file.stem != "base-":
            file.unlink()
    run.save_rows()
    assert not read_page(build_report(run.path)).all("details", class_="differences")
    run.row("base", "", "popular", "ece").update(value=0.0123)
    run.save_rows()
    (line,) = read_page(build_report(run.path)).one("details", class_="differences").all("li")
    assert re.fullmatch(r"Base, popular: 0\.\d{3} drawn, 0\.012 reported", line.text)


def test_loss_curves_are_the_logged_losses(run: RunFolder) -> None:
    file = run.path / "train" / "evidence-simpo" / "metrics.jsonl"
    file.write_text(file.read_text() + '\n{"step": 61, "loss": NaN}')
    section = read_page(build_report(run.path)).one("section", id="losses")
    names = [figure.one("span", class_="name").text for figure in section.all("figure")]
    assert names == ["SFT (paper)", "SFT (evidence)", "SimPO (evidence)"]
    for figure, name in zip(section.all("figure"), ("paper-sft", "evidence-sft", "evidence-simpo")):
        ticks = [t for t in figure.all("text") if t.attributes.get("text-anchor") == "end"]
        to_value = np.polyfit([float(t.attributes["y"]) - 3.5 for t in ticks], [float(t.text) for t in ticks], 1)
        drawn = [y for _, y in points(figure.all("path", class_="faint")[0].attributes["d"])]
        np.testing.assert_allclose(np.polyval(to_value, drawn), run.losses[name], atol=2e-3)
        # A twentieth of 60 steps: the mean of three.
        smooth = [y for _, y in points(figure.one("path", class_="line").attributes["d"])]
        means = np.convolve(run.losses[name], np.ones(3) / 3, "valid")
        np.testing.assert_allclose(np.polyval(to_value, smooth[1:-1]), means, atol=2e-3)
        assert figure.one("text", class_="label").text == f"{np.mean(run.losses[name][-2:]):.3g}"
    assert section.all("figure")[2].one("span", class_="note").text == "1 not finite"


def test_an_empty_metrics_file_draws_an_empty_panel(run: RunFolder) -> None:
    (run.path / "train" / "paper-sft" / "metrics.jsonl").write_text(json.dumps({"step": 3, "grad_norm": 1.0}))
    figure = read_page(build_report(run.path)).one("section", id="losses").all("figure")[0]
    assert not figure.all("path", class_="line")


def test_thinning_keeps_the_mean_and_moving_means_are_convolutions() -> None:
    values = np.random.default_rng(0).normal(size=1200)
    assert np.mean(thinned(list(values), 300)) == pytest.approx(values.mean())
    assert thinned([1.0, 2.0], 300) == [1.0, 2.0]
    smooth = moving_mean(list(values), 5)
    np.testing.assert_allclose(smooth[2:-2], np.convolve(values, np.ones(5) / 5, "valid"))
    assert smooth[0] == pytest.approx(values[:3].mean())


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.07), (0.31, 1.0), (-2.0, 1700.0), (3.0, 3.0), (0.0, 0.0)])
def test_axis_steps_are_round_even_and_cover_the_range(low: float, high: float) -> None:
    steps = round_steps(low, high)
    assert steps[0] <= low + 1e-9
    assert steps[-1] >= high - 1e-9
    if len(steps) > 1:
        gaps = np.diff(steps)
        np.testing.assert_allclose(gaps, gaps[0])
        mantissa = gaps[0] / 10 ** np.floor(np.log10(gaps[0]) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    assert len(steps) <= 9


def test_a_scale_of_no_length_stands_in_the_middle() -> None:
    assert Scale(2.0, 2.0, 0, 100)(2.0) == 50
