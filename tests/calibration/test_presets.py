"""The scores of a candidate sweep against sklearn and the rules written out by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk
from torch import tensor
from torchmetrics.functional.classification import binary_calibration_error

from csp_jax.calibration.presets import (
    PRESETS,
    csp_difference,
    csp_over_seeds,
    csp_scores,
    get_preset,
    make_sweep,
    predictions,
)

RESAMPLES = 200


def sweep(n=180, seed=0, broken=0.05):
    """Percents for yes and no, truths (0 = yes), image ids; some ties and some unparsable outputs."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n)
    confidence = np.clip(np.round(rng.normal(np.stack([60 - 25 * truth, 40 + 25 * truth], 1), 25)), 0, 100)
    confidence[: n // 20, 1] = confidence[: n // 20, 0]
    confidence[rng.random((n, 2)) < broken] = np.nan
    return confidence, truth, np.arange(n) // 6


def by_hand(confidence, truth):
    """The rules, a question at a time."""
    right, top, yes, said_yes, ties, unparsable = [], [], [], [], 0, 0
    for (c_yes, c_no), answer in zip(confidence / 100, truth, strict=True):
        broken = np.isnan(c_yes) or np.isnan(c_no)
        unparsable += broken
        ties += not broken and c_yes == c_no
        decided = not broken and c_yes != c_no
        choice = (0 if c_yes > c_no else 1) if decided else 1 - answer
        right.append(int(choice == answer))
        said_yes.append(int(choice == 0))
        top.append(0.5 if broken else max(c_yes, c_no))
        yes.append(0.5 if np.isnan(c_yes) else c_yes)
    return *(np.array(column) for column in (right, top, yes, said_yes)), ties, unparsable


def ece_by_hand(percent, y):
    index = np.maximum(-(-percent.astype(int) // 10) - 1, 0)
    return np.abs(np.bincount(index, percent / 100 - y, 10)).sum() / len(y)


@pytest.fixture(scope="module")
def scored():
    confidence, truth, images = sweep()
    return csp_scores(confidence, truth, images, percent=True, resamples=RESAMPLES)


def test_class_wise_scores_by_hand(scored):
    confidence, truth, _ = sweep()
    right, top, yes, said_yes, ties, unparsable = by_hand(confidence, truth)
    is_yes = (truth == 0).astype(int)
    expected = {
        "n": 180,
        "ties": ties,
        "unparsable": unparsable,
        "accuracy": right.mean(),
        "precision": sk.precision_score(is_yes, said_yes),
        "recall": sk.recall_score(is_yes, said_yes),
        "f1": sk.f1_score(is_yes, said_yes),
        "predicted_rate": said_yes.mean(),
        "ece": ece_by_hand(np.round(100 * yes), is_yes),
        "brier": ((yes - is_yes) ** 2).mean(),
        "nll": sk.log_loss(is_yes, np.clip(yes, 1e-6, 1 - 1e-6)),
        "auc_correctness": sk.roc_auc_score(right, top),
        "auc_classwise": sk.roc_auc_score(is_yes, yes),
        "auprc": sk.average_precision_score(is_yes, yes),
        "base_rate": is_yes.mean(),
        "best_constant_brier": is_yes.mean() * (1 - is_yes.mean()),
    }
    assert ties > 2
    assert unparsable > 5
    for name, value in expected.items():
        assert scored[name] == pytest.approx(value, abs=1e-5), name
    assert 0.02 < scored["null_ece"] < 0.15
    assert scored["convention"].startswith("csp-classwise: confidence of the positive candidate")
    for name in ("accuracy", "f1", "ece", "brier", "auc_correctness", "auc_classwise", "nll"):
        low, high = scored["intervals"][name]
        assert low < high
    low, high = scored["intervals"]["accuracy"]
    assert low < scored["accuracy"] < high


def test_confusion_matrix_and_accuracy_are_one(scored):
    """With undecided answers wrong on both sides, (true positives + true negatives) / n is the accuracy."""
    confidence, truth, _ = sweep()
    made = make_sweep(confidence, truth, percent=True)
    said, actual = np.asarray(made.predicted), np.asarray(made.actual)
    assert (said == actual).mean() == pytest.approx(scored["accuracy"], abs=1e-6)


def test_presets_name_their_pair_and_bins(scored):
    confidence, truth, images = sweep()
    right, top, yes, *_ = by_hand(confidence, truth)
    is_yes = (truth == 0).astype(int)
    found = {
        name: csp_scores(confidence, truth, images, percent=True, preset=name, resamples=RESAMPLES) for name in PRESETS
    }
    assert found["top-label"]["ece"] == pytest.approx(ece_by_hand(np.round(100 * top), right), abs=1e-5)
    assert found["top-label"]["base_rate"] == pytest.approx(right.mean())
    theirs = float(binary_calibration_error(tensor(yes), tensor(is_yes), n_bins=10))
    assert found["torchmetrics"]["ece"] == pytest.approx(theirs, abs=1e-5)
    edges = np.linspace(0, 1, 11)
    index = np.minimum(np.digitize(yes, edges) - 1, 9)
    left = np.abs(np.bincount(index, yes - is_yes, 10)).sum() / 180
    assert found["netcal"]["ece"] == pytest.approx(left, abs=1e-5)
    for name in PRESETS:
        assert found[name]["accuracy"] == pytest.approx(scored["accuracy"], abs=1e-6)
        assert found[name]["preset"] == name
        assert found[name]["convention"].startswith(name)


def test_probabilities_equal_percents(scored):
    confidence, truth, images = sweep()
    for table in (confidence / 100, (confidence / 100).astype(np.float32)):
        found = csp_scores(table, truth, images, resamples=RESAMPLES)
        for name in ("ece", "mce", "brier", "nll", "auc_correctness", "auc_classwise", "accuracy", "f1"):
            assert found[name] == pytest.approx(scored[name], abs=1e-5), name


def test_positive_no_swaps_the_class(scored):
    confidence, truth, images = sweep()
    found = csp_scores(confidence, truth, images, percent=True, positive=1, resamples=RESAMPLES)
    mirrored = csp_scores(confidence[:, ::-1], 1 - truth, images, percent=True, resamples=RESAMPLES)
    for name in ("precision", "recall", "f1", "ece", "brier", "auc_classwise"):
        assert found[name] == mirrored[name]
    assert found["accuracy"] == scored["accuracy"]
    assert found["auc_correctness"] == pytest.approx(scored["auc_correctness"], abs=1e-6)


def test_three_candidates_and_their_rules():
    nan = np.nan
    table = np.array([[0.9, 0.2, 0.1], [0.4, 0.4, 0.1], [0.5, nan, 0.2], [0.1, 0.4, 0.4], [nan, nan, nan]])
    choice, tie, unparsable = predictions(table)
    assert choice.tolist() == [0, -1, -1, -1, -1]
    assert tie.tolist() == [False, True, False, True, False]
    assert unparsable.tolist() == [False, False, True, False, True]
    made = make_sweep(table, np.zeros(5, int))
    assert made.right.tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_allclose(made.top, [0.9, 0.4, 1 / 3, 0.4, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(made.positive, [0.9, 0.4, 0.5, 0.1, 1 / 3], rtol=1e-6)


def test_difference_of_two_models_and_mean_over_seeds(scored):
    first, truth, images = sweep()
    second = sweep(seed=1)[0]
    options = {"percent": True, "resamples": RESAMPLES}
    alone = csp_scores(second, truth, images, **options)
    difference = csp_difference(first, second, truth, images, **options)
    mean = csp_over_seeds([first, second], truth, images, **options)
    for name in ("accuracy", "brier", "ece", "auc_classwise"):
        assert difference[name].value == pytest.approx(scored[name] - alone[name], abs=1e-5)
        assert mean[name].value == pytest.approx((scored[name] + alone[name]) / 2, abs=1e-5)
        assert difference[name].low < difference[name].high
    assert difference["accuracy"].low > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": np.array([[1.2, 0.1]])}, r"must lie in \[0, 1\]"),
        ({"confidence": np.array([0.2])}, "are needed"),
        ({"confidence": np.zeros((0, 2)), "truth_index": np.zeros(0, int)}, "are needed"),
        ({"truth_index": np.array([2])}, r"whole numbers in \[0, 2\)"),
        ({"truth_index": np.array([0.0])}, r"whole numbers in \[0, 2\)"),
        ({"positive": 2}, "positive = 2"),
        ({"preset": "mine"}, "unknown preset 'mine'"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"confidence": np.array([[0.2, 0.1]]), "truth_index": np.array([0]), **change}
    with pytest.raises(ValueError, match=message):
        csp_scores(**arguments)


def test_presets_are_the_four_by_name():
    assert list(PRESETS) == ["csp-classwise", "top-label", "torchmetrics", "netcal"]
    assert get_preset("netcal").pair == "classwise"
