"""The saved predictions of a run: what each model said of each held-out item, by model, recipe and seed."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csp_jax.errors import UserError
from csp_jax.report.series import Key

FILE_NAME = re.compile(r"(?P<model>.+?)(?:-(?P<recipe>paper|evidence)|-)?(?:-seed(?P<seed>\d+))?")
MEND = "evaluate this model again"


@dataclass(frozen=True)
class Predictions:
    """One file of predictions over n items.

    `confidence` [n, 2]: c(yes), c(no) in [0, 1], nan where the model's words could not be read; kept in the
    dtype of the file, because bin edges are compared in it.
    `truth` [n]: index of the right candidate (0 yes, 1 no). `image_id` [n]. `split_mask` [n, S] bool.
    """

    confidence: np.ndarray
    truth: np.ndarray
    image_id: np.ndarray
    split_mask: np.ndarray
    split_names: tuple[str, ...]

    def of_split(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Confidence [m, 2] and truth [m] of one split's items; empty where the file lacks the split."""
        if split not in self.split_names:
            return self.confidence[:0], self.truth[:0]
        chosen = self.split_mask[:, self.split_names.index(split)]
        return self.confidence[chosen], self.truth[chosen]


def load_all_predictions(folder: Path) -> dict[Key, dict[int | None, Predictions]]:
    """Every predictions/<model>-<recipe>[-seedN].npz by model and seed (None = the name gives no seed)."""
    found: dict[Key, dict[int | None, Predictions]] = {}
    for path in sorted(folder.glob("*.npz")):
        match = FILE_NAME.fullmatch(path.stem)
        if match is None:
            raise UserError("the file name is not <model>-<recipe>[-seedN].npz", file=path, mend="rename or remove it")
        key = Key(match["model"], match["recipe"] or "")
        seed = int(match["seed"]) if match["seed"] else None
        found.setdefault(key, {})[seed] = load_predictions(path)
    return found


def load_predictions(path: Path) -> Predictions:
    """One predictions file with its shapes and ranges checked; UserError naming the array that is wrong."""
    names = ("confidence", "truth", "image_id", "split_mask", "split_names")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise UserError("the array is missing", file=path, field=missing[0], mend=MEND)
            confidence, truth, image_id, mask, split_names = (archive[name] for name in names)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot be read as an npz file ({error})", file=path, mend=MEND) from error
    count, splits = len(truth), len(split_names)
    shapes = {"confidence": (confidence, (count, 2)), "truth": (truth, (count,))}
    shapes |= {"image_id": (image_id, (count,)), "split_mask": (mask, (count, splits))}
    for name, (array, shape) in shapes.items():
        if array.shape != shape:
            raise UserError(f"must have shape {list(shape)}", file=path, field=name, value=list(array.shape), mend=MEND)
    if not np.issubdtype(confidence.dtype, np.floating):
        raise UserError("must be floating", file=path, field="confidence", value=str(confidence.dtype), mend=MEND)
    _check_range(path, "confidence", confidence, (confidence < 0) | (confidence > 1), "must lie in [0, 1]")
    _check_range(path, "truth", truth, (truth != 0) & (truth != 1), "must be 0 (yes) or 1 (no)")
    return Predictions(
        confidence=confidence,
        truth=truth.astype(np.int64),
        image_id=image_id,
        split_mask=mask.astype(bool),
        split_names=tuple(str(name) for name in split_names),
    )


def _check_range(path: Path, name: str, array: np.ndarray, wrong: np.ndarray, problem: str) -> None:
    if wrong.any():
        worst = array[wrong].flat[0].item()
        raise UserError(problem, file=path, field=name, value=worst, mend=MEND)
