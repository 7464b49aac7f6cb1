"""A small run folder whose every figure the tests know, for the tests of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ["random", "popular", "adversarial", "attribute", "relation"]
MODELS = [
    ("base", ""),
    ("sft", "paper"),
    ("sft+simpo", "paper"),
    ("sft", "evidence"),
    ("sft+simpo", "evidence"),
    ("global", "evidence"),
]
METRICS = ["accuracy", "f1", "precision", "recall", "auc_correctness", "auc_classwise", "brier", "ece", "nll"]
METRICS += ["null_ece", "best_constant_brier"]
METRICS += ["direct_accuracy", "direct_precision", "direct_recall", "direct_f1"]
LEVELS = (100, 50, 0)


@dataclass
class RunFolder:
    path: Path
    rows: list[dict[str, Any]]
    confidence: dict[str, np.ndarray] = field(default_factory=dict)
    truth: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0))
    losses: dict[str, list[float]] = field(default_factory=dict)

    def save_rows(self) -> None:
        (self.path / "results.json").write_text(json.dumps(self.rows))

    def change(self, name: str, edit: Any) -> None:
        """Rewrite a JSON file of the folder by a function of its content."""
        file = self.path / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(edit(content) or content))

    def row(self, model: str, recipe: str, split: str, metric: str) -> dict[str, Any]:
        (found,) = [
            r for r in self.rows if (r["model"], r["recipe"], r["split"], r["metric"]) == (model, recipe, split, metric)
        ]
        return found


def _rows(random: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for model, recipe in MODELS:
        for number, split in enumerate(SPLITS):
            key = {"model": model, "recipe": recipe, "split": split, "n": 100 + number}
            for metric in METRICS:
                value = float(random.uniform(0.05, 0.9))
                ends = {"low": value - 0.04, "high": value + 0.06}
                rows.append({**key, "metric": metric, "value": value, **ends})
            rows.append({**key, "metric": "ties", "value": int(random.integers(0, 9))})
            rows.append({**key, "metric": "unparsable", "value": int(random.integers(0, 9))})
    return rows


def _predictions(run: RunFolder, random: np.random.Generator) -> None:
    """180 items, some of them in two splits; whole percents (so that bin edges are hit), ties, and nan."""
    run.truth = random.integers(0, 2, 180)
    run.mask = np.zeros((180, 5), bool)
    run.mask[np.arange(180), np.arange(180) % 5] = True
    run.mask[::10, 1] = True
    (run.path / "predictions").mkdir()
    for name in ("base-", "sft+simpo-paper", "sft+simpo-evidence", "sft-evidence"):
        percent = random.integers(0, 11, (180, 2)) * 10 + random.integers(0, 2, (180, 2)) * 3
        confidence = (np.minimum(percent, 100) / 100).astype(np.float32)
        confidence[::60, 1] = np.nan
        confidence[7::60] = np.nan
        run.confidence[name] = confidence
        np.savez(
            run.path / "predictions" / f"{name}.npz",
            confidence=confidence,
            truth=run.truth,
            image_id=np.arange(180) // 3,
            split_mask=run.mask,
            split_names=np.array(SPLITS),
        )


def _training(run: RunFolder, random: np.random.Generator) -> None:
    for name in ("paper-sft", "evidence-sft", "evidence-simpo"):
        folder = run.path / "train" / name
        folder.mkdir(parents=True)
        run.losses[name] = [float(loss) for loss in random.uniform(0.5, 3, 60)]
        lines = [{"step": i + 1, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(run.losses[name])]
        lines.insert(10, {"step": 10, "validation_ece": 0.2})
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def _strip(run: RunFolder, random: np.random.Generator) -> None:
    (run.path / "strip").mkdir()
    levels = []
    for level in LEVELS:
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run.path / "strip" / f"{level}.png")
        says = {"base": {"yes": 0.93, "no": 0.95}, "sft+simpo (evidence)": {"yes": level / 100, "no": None}}
        levels.append({"confidence": level, "image": f"strip/{level}.png", "says": says})
    strip = {"question": "Is there a <cup> & a spoon?", "truth": "yes", "levels": levels}
    (run.path / "strip.json").write_text(json.dumps(strip))


def _description(run: RunFolder) -> None:
    description = {
        "configuration": {"world": {"scenes": 12, "resolution": 64}, "recipe": "evidence"},
        "versions": {"jax": "0.10.2", "csp_jax": "0.1.0"},
        "seeds": [0],
        "stages": [{"name": "world", "seconds": 12.25}, {"name": "train", "seconds": 185}],
        "machine": {"cores": 2, "memory": "8 GB"},
        "notes": ["A fraction of the data."],
        "conventions": {"preset": "csp-classwise", "bins": 10, "level": 0.95, "resamples": 200},
    }
    (run.path / "run.json").write_text(json.dumps(description))


def make_run(path: Path) -> RunFolder:
    """The folder with every input that the report knows."""
    random = np.random.default_rng(5)
    path.mkdir()
    folder = RunFolder(path, _rows(random))
    folder.save_rows()
    _predictions(folder, random)
    _training(folder, random)
    _strip(folder, random)
    _description(folder)
    return folder
