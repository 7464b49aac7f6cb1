"""Reference folders: a checkpoint in the hub's layout, and cases with what the original made of them.

A case is a file of tensors: a picture with the pixel values that the original made of it, or token ids with the
original's logits, image features and greedy continuation. `cases.json` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from csp_jax.config import apply_overrides
from csp_jax.data.batch import Batch, Picture
from csp_jax.data.pictures import show
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, read_json
from csp_jax.families.registry import open_family
from csp_jax.models.hub import HubConfig
from csp_jax.models.registry import family_of
from csp_jax.models.tensor_files import TensorFile


@dataclasses.dataclass(frozen=True)
class GoldenPicture:
    """A picture of the reference: our view of it, and the original's pixel values in the order of our cells.

    `whole` may be in half precision (`half`) or left out; `sparse` holds every 7th row and column in full precision.
    """

    name: str
    shown: Picture
    tokens: int  # prompt slots that we give it
    whole: Float[np.ndarray, "cells rows columns 3"] | None
    sparse: Float[np.ndarray, "cells some_rows some_columns 3"] | None
    half: bool


class Golden:
    """The files of one folder."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = HubConfig.read(directory)
        self.family = family_of(self.config)
        self.host: HostFamily = open_family(directory, words=False)
        self.cases = read_json(directory / "cases.json")
        self.picture = functools.cache(self._picture)

    def overridden(self, case: str) -> HubConfig:
        """The configuration of a case, which may change fields of the folder's."""
        changes = [
            f"{field}={json.dumps(value)}" for field, value in self.cases[case].get("config_override", {}).items()
        ]
        return HubConfig(apply_overrides(dict(self.config.values), changes), self.config.file)

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """All tensors of a case's file."""
        file = TensorFile(self.directory / f"{name}.safetensors")
        return {key: file.read(key) for key in file.entries}

    def pictures(self, case: str) -> list[GoldenPicture]:
        """The pictures of a case, all rows together."""
        entry = self.cases[case]
        return [self.picture(name) for name in entry.get("images", entry.get("pixels", []))]

    def _picture(self, name: str) -> GoldenPicture:
        tensors = self.tensors(name)
        if "image_u8" not in tensors:
            raise UserError("no picture in it", file=self.directory / f"{name}.safetensors", field="image_u8")
        shown = show(self.host, Image.fromarray(tensors["image_u8"]))

        def cells(kind: str) -> np.ndarray | None:
            if kind not in tensors:
                return None
            try:
                return CELLS[self.family](tensors[kind].astype(np.float32), shown)
            except (ValueError, IndexError):  # another number of views than ours
                return np.zeros((0, *self.host.cell, 3), np.float32)

        half = "pixel_values_f16" in tensors
        whole, sparse = cells("pixel_values_f16" if half else "pixel_values"), cells("pixel_values_f32_stride7")
        return GoldenPicture(name, shown, self.host.image_tokens(shown.canvas), whole, sparse, half)


# --- the original's pixel values in the order of our cells ---------------------------------------------------------


def _squares(values: np.ndarray, shown: Picture) -> np.ndarray:
    return values.transpose(0, 2, 3, 1)


def _patches(values: np.ndarray, shown: Picture) -> np.ndarray:
    """Qwen2-VL: patches in the order of the merge, each (channel, frame, row, column); the frames are equal."""
    rows, columns = shown.grid
    side = round((values.shape[1] / 6) ** 0.5)
    patches = values.reshape(rows * columns, 2, 2, 3, 2, side, side)[:, :, :, :, 0]
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(rows * columns, 2 * side, 2 * side, 3)


def _crops(values: np.ndarray, shown: Picture) -> np.ndarray:
    """Phi: the view of the whole first, then the crops, then empty ones."""
    crops = values[0, : shown.cells].transpose(0, 2, 3, 1)
    return np.concatenate([crops[1:], crops[:1]])


CELLS: dict[str, Callable[..., np.ndarray]] = {
    "llava": _squares,
    "qwen_vl": _squares,
    "internvl2": _squares,
    "qwen2_vl": _patches,
    "phi3_vision": _crops,
}


# --- the original's token ids as our prompts -----------------------------------------------------------------------


def picture_slots(
    family: str, config: HubConfig, ids: Int[np.ndarray, "rows length"], features: int
) -> Bool[np.ndarray, "rows length"]:
    """Where image features (so many in all rows) go among the original's token ids."""
    if family == "phi3_vision":
        return ids < 0
    if family == "qwen_vl":
        start = config.get("visual.image_start_id", 151857)
        inside = np.cumsum(ids == start, axis=1) > np.cumsum(ids == start + 1, axis=1)
        return inside & (ids != start)
    if family == "internvl2":  # the configuration does not name the token: it is the one that is there so often
        found, counts = np.unique(ids, return_counts=True)
        return np.isin(ids, found[counts == features]) if features else np.zeros(ids.shape, bool)
    field, default = ("image_token_id", 151655) if family == "qwen2_vl" else ("image_token_index", 32000)
    return ids == config.get(field, default)


def deal(pictures: list[GoldenPicture], slots: list[int], file: Path) -> list[list[GoldenPicture]]:
    """The pictures of each row, in order, as many as fill its slots."""
    waiting, rows = list(pictures), []
    for count in slots:
        row: list[GoldenPicture] = []
        while count > 0 and waiting:
            row.append(waiting.pop(0))
            count -= row[-1].tokens
        if count:
            raise UserError("the pictures do not fill the slots", file=file, field="input_ids", value=slots)
        rows.append(row)
    return rows


def case_batch(golden: Golden, case: str, image_token: int) -> tuple[Batch, np.ndarray | None]:
    """A case's sequences as prompts with a target at every position, and the original's pixel values [rows, cells]."""
    tensors = golden.tensors(case)
    ids = tensors["input_ids"].astype(np.int32)
    mask = tensors.get("attention_mask", np.ones_like(ids)).astype(np.int32)
    pictures = golden.pictures(case)
    slots = picture_slots(golden.family, golden.config, ids, sum(picture.tokens for picture in pictures)) & (mask > 0)
    rows = deal(pictures, slots.sum(axis=1).tolist(), golden.directory / f"{case}.safetensors")
    batch = prompts_alone(np.where(slots, image_token, ids).astype(np.int32), mask)
    batch.grid = np.zeros((len(rows), max(map(len, rows)), 2), np.int32)
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            batch.grid[number, place] = picture.shown.grid
    if not pictures:
        return batch, None
    cells = [np.concatenate([_whole(golden, picture) for picture in row]) if row else None for row in rows]
    most = max(len(some) for some in cells if some is not None)
    pixels = np.zeros((len(rows), most, *golden.host.cell, 3), np.float32)
    for number, some in enumerate(cells):
        if some is not None:
            pixels[number, : len(some)] = some
    return batch, pixels


def _whole(golden: Golden, picture: GoldenPicture) -> np.ndarray:
    if picture.whole is None or not len(picture.whole):
        problem = "has no pixel values" if picture.whole is None else "has other views than ours"
        raise UserError(problem, file=golden.directory / f"{picture.name}.safetensors")
    return picture.whole


def prompts_alone(ids: Int[np.ndarray, "rows length"], segment: Int[np.ndarray, "rows length"]) -> Batch:
    """Sequences as prompts with a target at every position."""
    rows, length = ids.shape
    nothing = np.zeros((rows, 0), np.int32)
    return Batch(
        prompt_tokens=ids,
        prompt_segment=segment,
        slot_name=np.full((*ids.shape, 1), -1, np.int32),
        tokens=nothing,
        parent=nothing,
        target_token=np.zeros(ids.shape, np.int32),
        target_parent=np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        target_weight=np.ones(ids.shape, np.float32),
        target_response=np.zeros(ids.shape, np.int32),
        role=np.ones((rows, 1), np.int32),
        canvas=None,
        mask=None,
        confidence=np.zeros((rows, 0), np.float32),
        noise_id=np.zeros((rows, 0), np.uint32),
        groups=1,
    )
