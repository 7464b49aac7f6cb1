"""The tables of the page against the rows of results.json, and the headline against numpy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from report_folder import MODELS, SPLITS, RunFolder
from report_html import Node, read_page

from csp_jax.report import build_report

SHORT = {"accuracy": "Acc", "f1": "F1", "auc_correctness": "AUC", "brier": "Brier", "ece": "ECE"}
LOWER_IS_BETTER = {"brier", "ece"}
GROUPS = {"": "base", "Recipe: paper": "paper", "Recipe: evidence": "evidence"}


def cells_of(section: Node) -> dict[tuple[str, str, str, str], Node]:
    """(group, row name, split, column title) -> cell, read from the header cells as a reader would."""
    found = {}
    for table in section.all("table", class_="figures"):
        head = table.one("thead").own("tr")
        splits = [(th.children[0], int(th.attributes["colspan"])) for th in head[0].own("th")]
        across = [split for split, span in splits for _ in range(span)]
        titles = [th.text.split()[0] for th in head[1].own("th")]
        assert len(across) == len(titles)
        for row in table.all("tr"):
            if "data-name" not in row.attributes:
                continue
            name, group = row.attributes["data-name"], row.attributes["data-group"]
            assert row.one("th").text == name
            cells = row.own("td")
            assert len(cells) == len(titles)
            for split, title, cell in zip(across, titles, cells):
                found[group, name, str(split).lower(), title] = cell
    return found


def main_name(model: str, recipe: str) -> tuple[str, str]:
    names = {"base": "Base", "sft": "SFT", "sft+simpo": "SFT + SimPO", "global": "Global noise (evidence)"}
    group = "Ablations and controls" if model == "global" else (f"Recipe: {recipe}" if recipe else "")
    return group, names[model]


def figure(cell: Node) -> tuple[str, str]:
    """The figure and its interval as printed."""
    small = cell.own("small")
    interval = small[0].text if small else ""
    return cell.text.removesuffix(interval).strip(), interval


def without_zero(value: float) -> str:
    return f"{value:.3f}"[1:] if value < 0.9995 else f"{value:.3f}"


def test_every_cell_of_the_main_table_is_its_row_of_results(run: RunFolder) -> None:
    cells = cells_of(read_page(build_report(run.path)).one("section", id="results"))
    for model, recipe in MODELS:
        for split in SPLITS:
            for metric, title in SHORT.items():
                row = run.row(model, recipe, split, metric)
                printed = figure(cells[(*main_name(model, recipe), split, title)])
                expected = f"{without_zero(row['low'])}–{without_zero(row['high'])}"
                assert printed == (f"{row['value']:.3f}", expected)


def test_means_and_best_marks_follow_numpy(run: RunFolder) -> None:
    cells = cells_of(read_page(build_report(run.path)).one("section", id="results"))
    for metric, title in SHORT.items():
        table = np.array([[run.row(m, r, split, metric)["value"] for split in SPLITS] for m, r in MODELS])
        table = np.column_stack([table, table.mean(1)])
        best = table.argmin(0) if metric in LOWER_IS_BETTER else table.argmax(0)
        for column, split in enumerate([*SPLITS, "mean over splits"]):
            for line, (model, recipe) in enumerate(MODELS):
                cell = cells[(*main_name(model, recipe), split, title)]
                assert figure(cell)[0] == f"{table[line, column]:.3f}"
                assert ("best" in cell.attributes["class"].split()) == (line == best[column])


def test_equal_figures_share_the_best_mark(run: RunFolder) -> None:
    for model, recipe in MODELS[1:3]:
        run.row(model, recipe, "random", "ece").update(value=0.0101, low=0.0, high=0.1)
    run.save_rows()
    cells = cells_of(read_page(build_report(run.path)).one("section", id="results"))
    marked = {key[:2] for key, cell in cells.items() if key[2:] == ("random", "ECE") and cell.all("b")}
    assert marked == {("Recipe: paper", "SFT"), ("Recipe: paper", "SFT + SimPO")}


def test_reference_rows_stand_under_their_column_alone(run: RunFolder) -> None:
    for model, recipe in MODELS:
        run.row(model, recipe, "random", "best_constant_brier")["value"] = 0.25
    run.save_rows()
    cells = cells_of(read_page(build_report(run.path)).one("section", id="results"))
    assert figure(cells["For reference", "Best constant Brier", "random", "Brier"]) == ("0.250", "")
    nulls = [run.row(model, recipe, "random", "null_ece")["value"] for model, recipe in MODELS]
    span = f"{without_zero(min(nulls))}–{without_zero(max(nulls))}"
    assert figure(cells["For reference", "Null ECE", "random", "ECE"]) == ("", span)
    assert cells["For reference", "Null ECE", "random", "Brier"].text == ""


def test_direct_answers_are_in_their_own_table(run: RunFolder) -> None:
    cells = cells_of(read_page(build_report(run.path)).one("section", id="direct"))
    for title, metric in {
        "Acc": "direct_accuracy",
        "Precision": "direct_precision",
        "F1": "direct_f1",
    }.items():
        row = run.row("sft", "evidence", "relation", metric)
        assert figure(cells["Recipe: evidence", "SFT", "relation", title])[0] == f"{row['value']:.3f}"


def test_the_table_of_all_numbers_is_results_json(run: RunFolder) -> None:
    run.rows[3]["value"] = None
    run.save_rows()
    body = read_page(build_report(run.path)).one("section", id="numbers").one("tbody")
    lines = [[cell.text for cell in row.own("td")] for row in body.own("tr")]
    assert len(lines) == len(run.rows)
    for line, row in zip(lines, run.rows):
        assert line[:2] + line[3:5] == [row["model"], row["recipe"], row["split"], row["metric"]]
        assert line[5] == ("–" if row["value"] is None else f"{row['value']:.5g}")
        assert line[6] == (f"{row['low']:.5g}–{row['high']:.5g}" if "low" in row else "")
        assert line[7] == str(row["n"])


def test_ties_are_counts_shown_as_shares_of_n(run: RunFolder) -> None:
    section = read_page(build_report(run.path)).one("section", id="conventions")
    cells = cells_of(section)
    shares = {}
    for split in SPLITS:
        row = run.row("base", "", split, "ties")
        shares[split] = row["value"] / row["n"]
        assert figure(cells["", "Base", split, "Ties"])[0] == f"{shares[split]:.3f}"
    assert figure(cells["", "Base", "mean over splits", "Ties"])[0] == f"{np.mean(list(shares.values())):.3f}"
    largest = max(row["value"] / row["n"] for row in run.rows if row["metric"] == "ties")
    assert f"ties are at most {100 * largest:.1f}% of the items" in section.text


def _seeded(run: RunFolder, values: list[float]) -> dict[str, Any]:
    """Replace one row by one of each seed."""
    row = run.row("sft", "paper", "random", "ece")
    run.rows.remove(row)
    for seed, value in enumerate(values):
        run.rows.append({**row, "value": value, "low": value - 0.01, "high": value + 0.02, "seed": seed})
    return row


def test_seeds_are_averaged_with_the_span_of_their_intervals(run: RunFolder) -> None:
    _seeded(run, [0.3, 0.1, 0.23])
    run.save_rows()
    section = read_page(build_report(run.path)).one("section", id="results")
    cell = cells_of(section)["Recipe: paper", "SFT", "random", "ECE"]
    assert figure(cell) == ("0.210", ".090–.320")
    assert "several seeds (0, 1, 2)" in section.text


def test_a_row_that_pools_the_seeds_comes_before_their_mean(run: RunFolder) -> None:
    row = _seeded(run, [0.3, 0.1, 0.23])
    run.rows.append({**row, "value": 0.205, "low": 0.15, "high": 0.26})
    run.save_rows()
    section = read_page(build_report(run.path)).one("section", id="results")
    cell = cells_of(section)["Recipe: paper", "SFT", "random", "ECE"]
    assert figure(cell) == ("0.205", ".150–.260")
    assert "several seeds" not in section.text


def test_changes_are_marked_where_the_interval_excludes_none(run: RunFolder) -> None:
    cases = {
        "random": (-0.31, -0.35, -0.27, "better", "−0.310", "−.350 to −.270"),
        "popular": (0.12, 0.02, 0.2, "worse", "+0.120", ".020 to .200"),
        "adversarial": (-0.0002, -0.05, 0.03, "", "0.000", "−.050 to .030"),
        "relation": (-0.01, -0.05, 0.03, "", "−0.010", "−.050 to .030"),
    }
    for split, (value, low, high, *_) in cases.items():
        ends = {"value": value, "low": low, "high": high, "n": 100}
        run.rows.append({"model": "sft", "recipe": "evidence", "split": split, "metric": "delta_ece", **ends})
        run.rows.append(
            {"model": "sft", "recipe": "evidence", "split": split, "metric": "delta_auc_correctness", **ends}
        )
    run.save_rows()
    section = read_page(build_report(run.path)).one("section", id="results")
    changes = [t for t in section.all("div", class_="scroll") if "Change" in t.attributes["aria-label"]]
    cells = cells_of(Node("div", {}, list(changes)))
    opposite = {"better": "worse", "worse": "better", "": ""}
    for split, (*_, mark, text, interval) in cases.items():
        ece = cells["Recipe: evidence", "SFT", split, "ECE"]
        assert figure(ece) == (text, interval)
        assert ece.attributes["class"].split()[:1] == ([mark] if mark else [])
        auc = cells["Recipe: evidence", "SFT", split, "AUC"].attributes["class"].split()
        assert [name for name in auc if name != "first"] == ([opposite[mark]] if mark else [])


@pytest.mark.parametrize(("factor", "verb"), [(0.2, "falls"), (1.09, "rises"), (1.0, "stays at")])
def test_the_headline_says_what_happened(run: RunFolder, factor: float, verb: str) -> None:
    for split in SPLITS:
        base = run.row("base", "", split, "ece")["value"]
        run.row("sft+simpo", "evidence", split, "ece").update(value=base * factor, low=0.0, high=1.0)
    run.save_rows()
    header = read_page(build_report(run.path)).one("header")
    before = np.mean([run.row("base", "", split, "ece")["value"] for split in SPLITS])
    change = f"stays at {before:.3f}" if factor == 1 else f"{verb} from {before:.3f} to {before * factor:.3f}"
    assert f"over five splits {change} after SFT + SimPO with the evidence recipe" in header.text
    for metric, name in {"brier": "Brier", "direct_accuracy": "Direct-answer accuracy"}.items():
        means = [
            np.mean([run.row(model, recipe, split, metric)["value"] for split in SPLITS])
            for model, recipe in (("base", ""), ("sft+simpo", "evidence"))
        ]
        (fact,) = [div for div in header.all("div") if div.one("dt").text == name]
        assert fact.one("dd").text == f"{means[0]:.3f} → {means[1]:.3f}"


def test_dots_stand_at_their_figures(run: RunFolder) -> None:
    table = read_page(build_report(run.path)).one("section", id="glance").one("table")
    axis = table.one("tfoot").all("span", class_="axis")[0].all("i")
    at = [float(re.fullmatch(r"left:([\d.]+)%", tick.attributes["style"])[1]) for tick in axis]
    to_value = np.polyfit(at, [float(tick.text) for tick in axis], 1)
    for (model, recipe), row in zip(MODELS, table.one("tbody").own("tr")):
        cell = row.own("td")[0]
        dots = [float(dot.attributes["d"][1:].split(",")[0]) for dot in cell.all("path", class_="split-dot")]
        values = [run.row(model, recipe, split, "ece")["value"] for split in SPLITS]
        np.testing.assert_allclose(np.polyval(to_value, dots), values, atol=2e-4)
        assert cell.all("span")[-1].text == f"{np.mean(values):.3f}"
