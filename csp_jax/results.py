"""From what models said to the rows of results.json: every score with its interval and its change from the base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from csp_jax.calibration import metrics
from csp_jax.calibration.binning import bin_count
from csp_jax.calibration.bootstrap import Interval, bootstrap, over_seeds
from csp_jax.calibration.presets import Sweep, SweepScores, conventions, csp_scores, get_preset, make_sweep
from csp_jax.evaluate import SUBSETS, Answers
from csp_jax.report.inputs import UNIT_METRICS

READINGS = {
    "expected": "mean of the exact distribution over the answers 0%..100% (greedy text beside it as greedy_ metrics)",
    "greedy": "the percentage that greedy decoding says",
}
PRESET, BINS, LEVEL = "csp-classwise", 10, 0.95
Row = dict[str, Any]


def _sweep_scores(bins: int) -> SweepScores:
    return SweepScores(bins, bin_count(bins, get_preset(PRESET).binning))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Said:
    """A model's confidences and its ordinary answers to the same questions."""

    sweep: Sweep
    direct_right: Float[Array, " n"]
    direct_yes: Float[Array, " n"]
    is_yes: Float[Array, " n"]


@dataclasses.dataclass(frozen=True)
class SaidScores:
    """Scores of a model's confidences, of its ordinary answers ([A] fig. 5), and both less the base's."""

    bins: int = BINS

    def one(self, said: Said, weight: Float[Array, " n"]) -> dict[str, Array]:
        detection = metrics.precision_recall_f1(said.direct_yes, said.is_yes, weight)
        return {
            **_sweep_scores(self.bins)(said.sweep, weight),
            "direct_accuracy": metrics.ratio((said.direct_right * weight).sum(), weight.sum()),
            "direct_precision": detection.precision,
            "direct_recall": detection.recall,
            "direct_f1": detection.f1,
        }

    def __call__(self, data: tuple[Said, ...], weight: Float[Array, " n"]) -> dict[str, Array]:
        found = self.one(data[0], weight)
        if len(data) == 1:
            return found
        base = self.one(data[1], weight)
        return {**found, **{f"delta_{name}": found[name] - base[name] for name in found}}


def _reading(answers: Answers, reading: str) -> np.ndarray:
    return answers.expected if reading == "expected" else answers.greedy


def _said(answers: Answers, reading: str, chosen: np.ndarray) -> Said:
    truth = answers.truth[chosen]
    direct = answers.direct[chosen]
    return Said(
        make_sweep(_reading(answers, reading)[chosen], truth, preset=PRESET, bins=BINS),
        jnp.asarray(direct == truth, jnp.float32),
        jnp.asarray(np.where(direct < 0, truth != 0, direct == 0), jnp.float32),
        jnp.asarray(truth == 0, jnp.float32),
    )


def result_rows(
    runs: Sequence[Answers],
    base: Answers | None,
    *,
    model: str,
    recipe: str,
    reading: str = "expected",
    resamples: int = 1000,
) -> list[Row]:
    """Rows `{model, recipe, split, metric, value, low, high, n}` of one model (several seeds: their mean).

    `delta_…` metrics are the model's less the base's on the same questions. Intervals resample images and seeds.
    """
    rows: list[Row] = []
    images = np.array(runs[0].image_ids)
    for split in (*SUBSETS, "mean"):
        column = np.ones(len(images), bool) if split == "mean" else runs[0].subsets[:, SUBSETS.index(split)]
        if not column.any():
            continue
        if split == "mean":
            found = _mean_scores(runs, base, reading, resamples)
        else:
            found = _intervals(runs, base, reading, column, SaidScores(), resamples)
        n = int(column.sum())
        common = {"model": model, "recipe": recipe, "split": split}
        rows += [
            {
                **common,
                "metric": name,
                "value": _finite(i.value),
                "low": _inside(name, i.low),
                "high": _inside(name, i.high),
                "n": n,
            }
            for name, i in found.items()
        ]
        if split != "mean":
            rows += [{**common, "n": n, **row} for row in _references(runs, reading, column)]
    return rows


def _inside(metric: str, edge: float) -> float | None:
    """An interval's edge within the metric's range, past which widening for few seeds may carry it."""
    return _finite(float(np.clip(edge, 0.0, 1.0)) if metric in UNIT_METRICS else edge)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _intervals(
    runs: Sequence[Answers],
    base: Answers | None,
    reading: str,
    column: np.ndarray,
    statistic: Any,
    resamples: int,
) -> dict[str, Interval]:
    reference = () if base is None else (_said(base, reading, column),)
    data = [(_said(run, reading, column), *reference) for run in runs]
    images = np.array(runs[0].image_ids)[column]
    if len(data) == 1:
        return bootstrap(statistic, data[0], clusters=images, resamples=resamples, level=LEVEL)
    return over_seeds(statistic, data, clusters=images, resamples=resamples, level=LEVEL)


@dataclasses.dataclass(frozen=True)
class MeanScores:
    """Means over the five splits of the scores that headlines quote; masks come with the data."""

    names: tuple[str, ...] = ("ece", "brier", "auc_correctness", "accuracy")

    def one(self, said: Said, masks: Array, weight: Float[Array, " n"]) -> dict[str, Array]:
        scores = [_sweep_scores(BINS)(said.sweep, weight * mask) for mask in masks.T]
        return {name: jnp.mean(jnp.stack([score[name] for score in scores])) for name in self.names}

    def __call__(self, data: tuple[Any, ...], weight: Float[Array, " n"]) -> dict[str, Array]:
        masks, said, *base = data
        found = self.one(said, masks, weight)
        if not base:
            return found
        reference = self.one(base[0], masks, weight)
        return {**found, **{f"delta_{name}": found[name] - reference[name] for name in found}}


def _mean_scores(runs: Sequence[Answers], base: Answers | None, reading: str, resamples: int) -> dict[str, Interval]:
    everything = np.ones(len(runs[0].truth), bool)
    masks = jnp.asarray(runs[0].subsets, jnp.float32)
    reference = () if base is None else (_said(base, reading, everything),)
    data = [(masks, _said(run, reading, everything), *reference) for run in runs]
    images = np.array(runs[0].image_ids)
    if len(data) == 1:
        return bootstrap(MeanScores(), data[0], clusters=images, resamples=resamples, level=LEVEL)
    return over_seeds(MeanScores(), data, clusters=images, resamples=resamples, level=LEVEL)


def _references(runs: Sequence[Answers], reading: str, column: np.ndarray) -> list[Row]:
    """Counts and reference values without an interval, as means over seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        scores = csp_scores(_reading(run, reading)[column], run.truth[column], preset=PRESET, bins=BINS, resamples=0)
        for name in ("null_ece", "base_rate", "best_constant_brier", "ties", "unparsable"):
            found.setdefault(name, []).append(scores[name])
        greedy = csp_scores(run.greedy[column], run.truth[column], preset=PRESET, bins=BINS, resamples=0)
        for name in ("accuracy", "ece", "brier", "auc_correctness", "ties", "unparsable"):
            found.setdefault(f"greedy_{name}", []).append(greedy[name])
    counts = ("ties", "unparsable", "greedy_ties", "greedy_unparsable")
    return [
        {
            "metric": name,
            "value": round(float(np.mean(values))) if name in counts else _finite(float(np.mean(values))),
            "low": None,
            "high": None,
        }
        for name, values in found.items()
    ]


def report_conventions(resamples: int) -> dict[str, Any]:
    """What a reader must know to compare the figures."""
    return conventions(PRESET, BINS, LEVEL, resamples)


def write_rows(file: Path, rows: list[Row]) -> None:
    """results.json, atomically."""
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.rename(file)
