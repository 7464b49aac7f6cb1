"""Which confidence is compared with which outcome: conventions by name, and scores of a candidate sweep.

For every question each candidate answer's confidence was elicited. The prediction is the candidate with the
highest confidence. Rules that no preset changes:

- Ties for the highest and unparsable outputs (nan for any candidate) have no prediction: they are wrong, in
  the accuracy and in precision, recall and F1 alike (a missing answer to a positive is a false negative, to a
  negative a false positive), and they are counted. n stays whole.
- An unparsable candidate's confidence enters ECE, Brier, NLL and the ranks as 1/k for k candidates (1/2 for
  yes/no): who says nothing says no more than chance. `unparsable` counts the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from csp_jax.calibration import metrics, ranking
from csp_jax.calibration.binning import Binning, bin_count, describe, probabilities
from csp_jax.calibration.bootstrap import Interval, bootstrap, null_ece_of, over_seeds, paired_difference
from csp_jax.calibration.metrics import NLL_CLIP, Array
from csp_jax.calibration.scores import Pairs, calibration_scores, make_pairs, selection_scores


@dataclass(frozen=True)
class Preset:
    """What a calibration figure means: its pair of confidence and outcome, and its bins."""

    name: str
    pair: Literal["classwise", "top-label"]
    binning: Binning

    def describe(self, bins: int) -> str:
        """One line for reports."""
        pairs = {
            "classwise": "confidence of the positive candidate against [truth is the positive candidate]",
            "top-label": "confidence of the predicted candidate against [the prediction is right]",
        }
        return f"{self.name}: {pairs[self.pair]}; {describe(bins, self.binning)}"


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("csp-classwise", "classwise", "right_closed"),
        Preset("top-label", "top-label", "right_closed"),
        Preset("torchmetrics", "classwise", "torchmetrics"),
        Preset("netcal", "classwise", "netcal"),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sweep:
    """A candidate sweep as arrays over questions; made by `make_sweep`."""

    pairs: Pairs
    top: Float[jax.Array, " n"]
    right: Float[jax.Array, " n"]
    positive: Float[jax.Array, " n"]
    predicted: Float[jax.Array, " n"]
    actual: Float[jax.Array, " n"]
    tie: Float[jax.Array, " n"]
    unparsable: Float[jax.Array, " n"]


@dataclass(frozen=True)
class SweepScores:
    """The statistic of a candidate sweep; `rows` as `bin_count(bins, binning)` says."""

    bins: int = 10
    rows: int = 10

    def __call__(self, sweep: Sweep, weight: Float[Array, " n"]) -> dict[str, jax.Array]:
        detection = metrics.precision_recall_f1(sweep.predicted, sweep.actual, weight)
        totals = metrics.score_sums(sweep.top, sweep.right, weight)
        top = (sweep.top, sweep.right, weight, ranking.tie_groups(sweep.top))
        classwise = (sweep.positive, sweep.actual, weight, ranking.tie_groups(sweep.positive))
        return {
            "accuracy": metrics.accuracy(totals),
            "precision": detection.precision,
            "recall": detection.recall,
            "f1": detection.f1,
            **calibration_scores(sweep.pairs, weight, self.rows, self.bins),
            "auc_correctness": ranking.auroc(*top),
            "auc_classwise": ranking.auroc(*classwise),
            "auprc": ranking.average_precision(*classwise),
            **selection_scores(*top),
        }


def _checked(
    confidence: Shaped[Array, "n candidates"], truth_index: Int[Array, " n"], positive: int, percent: bool
) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(confidence)
    if not np.issubdtype(table.dtype, np.floating):
        table = table.astype(np.float64)
    truth = np.asarray(truth_index)
    if table.ndim != 2 or table.shape[1] < 2 or truth.shape != table.shape[:1] or not len(table):
        needed = "[n >= 1, candidates >= 2] and [n] are needed"
        raise ValueError(f"confidence {table.shape}, truth_index {truth.shape}: {needed}")
    top = 100 if percent else 1
    if not ((table >= 0) & (table <= top) | np.isnan(table)).all():
        raise ValueError(f"confidences must lie in [0, {top}] or be nan")
    candidates = table.shape[1]
    if not (np.issubdtype(truth.dtype, np.integer) and ((truth >= 0) & (truth < candidates)).all()):
        raise ValueError(f"truth_index must hold whole numbers in [0, {candidates})")
    if not 0 <= positive < candidates:
        raise ValueError(f"positive = {positive}: must lie in [0, {candidates})")
    return table, truth


def _in_bins(confidence: Float[np.ndarray, " n"], percent: bool) -> np.ndarray:
    """Whole percents as integers, other percents as probabilities."""
    if not percent:
        return confidence
    return confidence.astype(np.int32) if (confidence % 1 == 0).all() else confidence / 100


def predictions(
    confidence: Float[np.ndarray, "n candidates"],
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Per question: the candidate of highest confidence (-1: none), whether tied, whether unparsable."""
    unparsable = np.isnan(confidence).any(1)
    known = np.where(unparsable[:, None], 0, confidence)
    tie = ((known == known.max(1, keepdims=True)).sum(1) > 1) & ~unparsable
    return np.where(tie | unparsable, -1, known.argmax(1)), tie, unparsable


def make_sweep(
    confidence: Float[Array, "n candidates"],
    truth_index: Int[Array, " n"],
    *,
    positive: int = 0,
    preset: str = "csp-classwise",
    bins: int = 10,
    percent: bool = False,
) -> Sweep:
    """The arrays that `SweepScores` scores; see `csp_scores` for the arguments and errors."""
    table, truth = _checked(confidence, truth_index, positive, percent)
    choice, tie, unparsable = predictions(table)
    blank = (100 if percent else 1) / table.shape[1]
    of_positive = np.where(np.isnan(table[:, positive]), table.dtype.type(blank), table[:, positive])
    of_choice = np.where(unparsable, table.dtype.type(blank), np.where(unparsable[:, None], 0, table).max(1))
    right, actual = choice == truth, truth == positive
    convention = get_preset(preset)
    classwise = convention.pair == "classwise"
    calibrated = _in_bins(of_positive if classwise else of_choice, percent)
    said_positive = np.where(choice < 0, ~actual, choice == positive)
    flags = (jnp.asarray(flag, jnp.float32) for flag in (said_positive, actual, tie, unparsable))
    return Sweep(
        make_pairs(calibrated, actual if classwise else right, bins, convention.binning),
        probabilities(_in_bins(of_choice, percent)),
        jnp.asarray(right, jnp.float32),
        probabilities(_in_bins(of_positive, percent)),
        *flags,
    )


def conventions(preset: str, bins: int, level: float, resamples: int) -> dict[str, Any]:
    """What a reader must know to compare figures: preset, bins, interval level, clipping."""
    return {
        "preset": preset,
        "bins": bins,
        "binning": describe(bins, get_preset(preset).binning),
        "convention": get_preset(preset).describe(bins),
        "nll_clip": NLL_CLIP,
        "level": level,
        "resamples": resamples,
    }


def csp_scores(
    confidence: Float[Array, "n candidates"],
    truth_index: Int[Array, " n"],
    image_ids: Sequence[Any] | np.ndarray | None = None,
    *,
    positive: int = 0,
    preset: str = "csp-classwise",
    bins: int = 10,
    percent: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """All scores of a candidate sweep ([A] 4.2), with bootstrap intervals clustered by image.

    `confidence`: of each candidate, in [0, 1] or (with `percent`) [0, 100], nan = unparsable;
    `truth_index`: the right candidate; `positive`: the candidate that is the positive class of precision,
    recall, F1, class-wise pairs and AUPRC (0: "yes" where candidates are yes, no). Calibration scores (ece
    ... nll) are those of the preset's pair; `auc_correctness`, aurc ... kendall_tau_b rank being right by
    the confidence of the prediction; `auc_classwise` and auprc rank the truth by the positive candidate's
    confidence. `intervals` maps each name to (low, high). Raises ValueError for misshapen or out-of-range
    input and unknown presets.
    """
    convention = get_preset(preset)
    arguments: dict[str, Any] = {"positive": positive, "preset": preset, "bins": bins, "percent": percent}
    sweep = make_sweep(confidence, truth_index, **arguments)
    statistic = SweepScores(bins, bin_count(bins, convention.binning))
    found = bootstrap(statistic, sweep, clusters=image_ids, resamples=resamples, level=level, seed=seed)
    n = int(sweep.top.shape[0])
    outcome = np.asarray(sweep.pairs.outcome, np.float64)
    return {
        "n": n,
        **{name: interval.value for name, interval in found.items()},
        "ties": int(sweep.tie.sum()),
        "unparsable": int(sweep.unparsable.sum()),
        "null_ece": null_ece_of(sweep.pairs, statistic.rows, seed),
        "base_rate": float(outcome.mean()),
        "best_constant_brier": float(metrics.best_constant_brier(outcome)),
        "positive": positive,
        "predicted_rate": float(sweep.predicted.mean()),
        **conventions(preset, bins, level, resamples),
        "intervals": {name: (interval.low, interval.high) for name, interval in found.items()},
    }


def csp_difference(
    first: Float[Array, "n candidates"],
    second: Float[Array, "n candidates"],
    truth_index: Int[Array, " n"],
    image_ids: Sequence[Any] | np.ndarray | None = None,
    *,
    positive: int = 0,
    preset: str = "csp-classwise",
    bins: int = 10,
    percent: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Scores of `first` less those of `second`, two models on the same questions; see `csp_scores`."""
    made = [
        make_sweep(table, truth_index, positive=positive, preset=preset, bins=bins, percent=percent)
        for table in (first, second)
    ]
    statistic = SweepScores(bins, bin_count(bins, get_preset(preset).binning))
    return paired_difference(statistic, *made, clusters=image_ids, resamples=resamples, level=level, seed=seed)


def csp_over_seeds(
    runs: Sequence[Float[Array, "n candidates"]],
    truth_index: Int[Array, " n"],
    image_ids: Sequence[Any] | np.ndarray | None = None,
    *,
    positive: int = 0,
    preset: str = "csp-classwise",
    bins: int = 10,
    percent: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Scores averaged over training seeds, with intervals over images and seeds; see `csp_scores`."""
    made = [
        make_sweep(table, truth_index, positive=positive, preset=preset, bins=bins, percent=percent) for table in runs
    ]
    statistic = SweepScores(bins, bin_count(bins, get_preset(preset).binning))
    return over_seeds(statistic, made, clusters=image_ids, resamples=resamples, level=level, seed=seed)
