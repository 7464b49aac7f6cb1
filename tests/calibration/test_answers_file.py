"""A file of answers: what is computed from it, and what is said about a bad one."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from csp_jax.calibration.answers_file import metrics_of_file, read_answers
from csp_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
EXACT = json.loads((GOLDEN / "ece_exact.json").read_text())
LIBRARIES = json.loads((GOLDEN / "metrics.json").read_text())
INPUTS = np.load(GOLDEN / "metrics_inputs.npz")
RESAMPLES = 100


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def rows_of(name, confidence=float):
    pairs = zip(INPUTS[f"{name}_p"].tolist(), INPUTS[f"{name}_y"].tolist(), strict=True)
    return [{"id": f"q{i}", "confidence": confidence(p), "correct": bool(y)} for i, (p, y) in enumerate(pairs)]


def test_golden_scores_from_a_file(tmp_path):
    found = metrics_of_file(write(tmp_path / "a.jsonl", rows_of("beta500")), bins=15, resamples=RESAMPLES)
    golden = LIBRARIES["beta500"]
    assert found["n"] == 500
    assert found["ece"] == pytest.approx(golden["binned"]["bins15"]["ref_right"], abs=1e-5)
    assert found["mce"] == pytest.approx(golden["binned"]["bins15"]["ref_right_mce"], abs=1e-5)
    assert found["brier"] == pytest.approx(golden["scalar"]["brier_sklearn"], abs=1e-5)
    assert found["auroc"] == pytest.approx(golden["scalar"]["auroc_sklearn"], abs=1e-5)
    assert found["auprc"] == pytest.approx(golden["scalar"]["ap_sklearn"], abs=1e-5)
    assert found["nll"] == pytest.approx(golden["scalar"]["logloss_sklearn"], abs=1e-5)
    assert found["spearman"] == pytest.approx(golden["scalar"]["spearman_scipy"][0], abs=1e-5)
    assert found["kendall_tau_b"] == pytest.approx(golden["scalar"]["kendall_b_scipy"][0], abs=1e-5)
    assert found["accuracy"] == pytest.approx(INPUTS["beta500_y"].mean(), abs=1e-6)
    split = found["brier_reliability"] - found["brier_resolution"] + found["brier_uncertainty"]
    assert split + found["brier_within_bin"] == pytest.approx(found["brier"], abs=1e-5)
    low, high = found["intervals"]["brier"]
    assert low < found["brier"] < high
    assert found["binning"] == "15 equal-width bins (a, b], 0 in the first, exact edges k/15"
    assert sum(found["curve"]["weight"]) == 500
    assert {"adaptive_ece", "smooth_ece", "aurc", "null_ece", "debiased_ece"} <= found.keys()


@pytest.mark.parametrize("name", ["percent400", "edges20"])
def test_three_ways_to_write_a_percent(tmp_path, name):
    ways = {
        "share": (rows_of(name), False),
        "text": (rows_of(name, lambda p: f"{round(100 * p)}%"), False),
        "number": (rows_of(name, lambda p: round(100 * p)), True),
    }
    for way, (rows, percent) in ways.items():
        path = write(tmp_path / f"{way}.jsonl", rows)
        found = metrics_of_file(path, percent=percent, resamples=RESAMPLES)
        assert found["ece"] == pytest.approx(EXACT[name]["bins10"]["right_closed"]["ece"], abs=1e-6), way
        assert found["brier"] == pytest.approx(LIBRARIES[name]["scalar"]["brier_sklearn"], abs=1e-6)


def test_presets_set_the_bins(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of("percent400"))
    golden = LIBRARIES["percent400"]["binned"]["bins15"]
    for preset, key in (("torchmetrics", "torchmetrics_f64_l1"), ("netcal", "netcal_ece_detection")):
        found = metrics_of_file(path, bins=15, preset=preset, resamples=RESAMPLES)
        assert found["ece"] == pytest.approx(golden[key], abs=1e-5)
        assert found["preset"] == preset


def test_weights_are_counts_and_images_are_drawn_together(tmp_path):
    rng = np.random.default_rng(0)
    p, y, weight = rng.integers(0, 101, 120) / 100, rng.integers(0, 2, 120), rng.integers(0, 3, 120)
    rows = [
        {"id": i, "confidence": c, "correct": r, "weight": w, "image_id": f"image{i // 30}"}
        for i, (c, r, w) in enumerate(zip(p.tolist(), y.tolist(), weight.tolist(), strict=True))
    ]
    found = metrics_of_file(write(tmp_path / "a.jsonl", rows), resamples=RESAMPLES)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, p, sample_weight=weight), abs=1e-5)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, p, sample_weight=weight), abs=1e-5)
    assert found["weight"] == weight.sum()
    assert found["clustered_by"] == "image_id"
    for row in rows:
        row["image_id"] = str(row["id"])
    free = metrics_of_file(write(tmp_path / "b.jsonl", rows), resamples=RESAMPLES)
    assert free["brier"] == found["brier"]
    assert free["intervals"]["brier"] != found["intervals"]["brier"]


def test_one_answer_and_one_class_do_not_crash(tmp_path):
    found = metrics_of_file(write(tmp_path / "a.jsonl", rows_of("single")), resamples=RESAMPLES)
    assert found["ece"] == pytest.approx(0.27, abs=1e-6)
    assert np.isnan(found["auroc"])
    assert np.isnan(found["spearman"])


def test_other_fields_blank_lines_and_a_byte_order_mark_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        '{"id": 1, "confidence": "72.5 %", "correct": 1, "note": "x"}',
        "",
        '{"id": "1", "confidence": 0, "correct": 0.0}',
    ]
    path.write_text("\ufeff" + "\r\n".join(lines), newline="")
    answers = read_answers(path)
    assert answers.ids == [1, "1"]
    assert answers.confidence.tolist() == [0.725, 0.0]
    assert answers.correct.tolist() == [1.0, 0.0]
    assert answers.image_ids is None


GOOD = {"id": "a", "confidence": 0.5, "correct": True}


@pytest.mark.parametrize(
    ("row", "percent", "parts"),
    [
        ('{"id": "b", ', False, ["is not valid JSON", "one object a line"]),
        ("[1, 2]", False, ["is not a JSON object"]),
        ('{"id": "b", "confidence": NaN, "correct": true}', False, ["NaN is not a number"]),
        ('{"id": "b", "id": "c", "confidence": 1, "correct": true}', False, ['"id" stands twice']),
        ({"id": "b", "correct": True}, False, ["confidence", "is missing"]),
        ({"id": "b", "confidence": 0.5}, False, ["correct", "is missing"]),
        ({"confidence": 0.5, "correct": True}, False, ["id", "is missing"]),
        (GOOD, False, ["id = 'a'", "stands twice", "line 1"]),
        (
            {"id": "b", "confidence": 73, "correct": True},
            False,
            ["confidence = 73", "outside [0, 1]", "--percent"],
        ),
        ({"id": "b", "confidence": -0.1, "correct": True}, False, ["confidence = -0.1", "outside [0, 1]"]),
        ({"id": "b", "confidence": 101, "correct": True}, True, ["confidence = 101", "outside [0, 100]"]),
        (
            {"id": "b", "confidence": "101%", "correct": True},
            False,
            ["confidence = '101%'", "outside [0, 100]"],
        ),
        ({"id": "b", "confidence": "sure", "correct": True}, False, ["confidence = 'sure'", "no percent"]),
        ({"id": "b", "confidence": True, "correct": True}, False, ["confidence = True", "not a number"]),
        ({"id": "b", "confidence": None, "correct": True}, False, ["confidence", "not a number"]),
        ('{"id": "b", "confidence": 1e999, "correct": true}', False, ["confidence = inf", "not a number"]),
        ({"id": "b", "confidence": 0.5, "correct": "yes"}, False, ["correct = 'yes'", "true or false"]),
        ({"id": "b", "confidence": 0.5, "correct": 2}, False, ["correct = 2", "true or false"]),
        ({"id": "b", "confidence": 0.5, "correct": True, "weight": -1}, False, ["weight = -1", "negative"]),
        (
            {"id": "b", "confidence": 0.5, "correct": True, "weight": "2"},
            False,
            ["weight = '2'", "not a number"],
        ),
        (
            {"id": "b", "confidence": 0.5, "correct": True, "image_id": "x"},
            False,
            ["image_id = 'x'", "on none"],
        ),
        ({"id": 1.5, "confidence": 0.5, "correct": True}, False, ["id = 1.5", "whole number"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, percent, parts):
    path = write(tmp_path / "answers.jsonl", [GOOD, row])
    with pytest.raises(UserError) as caught:
        read_answers(path, percent=percent)
    message = str(caught.value)
    assert f"{path}:2:" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_bad_files_and_arguments_are_named(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [""])
    idle = write(tmp_path / "idle.jsonl", [{**GOOD, "weight": 0}])
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    good = write(tmp_path / "good.jsonl", [GOOD])
    for path, part in (
        (empty, "has no answers"),
        (idle, "all weights are 0"),
        (binary, "not UTF-8"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(UserError, match=part) as caught:
            metrics_of_file(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="is not a known preset"):
        metrics_of_file(good, preset="mine")
    with pytest.raises(UserError, match="bins = 0"):
        metrics_of_file(good, bins=0)
