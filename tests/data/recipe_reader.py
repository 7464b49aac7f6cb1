"""Reads a recipe's samples back: which questions were asked about which buried region, with which labels."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import tiny_values, write_folder

from csp_jax.config import RecipeConfig
from csp_jax.data.batch import Picture, Sample
from csp_jax.data.recipes import RECIPES
from csp_jax.data.recipes.base import Drawn, Objective, Recipe
from csp_jax.records import Item, Record, decode_mask
from csp_jax.text import Prompts
from csp_jax.world import World, WorldConfig
from csp_jax.world.tokenizer import build_tokenizer

ROOM = {"prompt": 128, "groups": 40, "length": 200, "targets": 100, "responses": 200}
CONFIDENCE = re.compile(r"A model was asked: (.*?) It answered: (.*?)\. How sure .*\? ASSISTANT: (\d+)%</s>")
ANSWER = re.compile(r"^(.*) ASSISTANT: (.*)</s>$")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One branch: a question, a response, the percentage that answers the confidence query (None: no such query)."""

    question: str
    response: str
    percent: int | None
    role: int
    taught: str


class Reader:
    """Makes recipes over a world whose canvases are its pictures, and reads what they drew."""

    def __init__(self, folder: Path):
        config = WorldConfig(statistics_scenes=300)
        values = tiny_values(vocab_size=1024)
        values["vision_config"].update(image_size=config.canvas, patch_size=10)
        self.world, self._records = World(config), {}
        self.folder = write_folder(folder, values, build_tokenizer(config, scenes=100))

    def recipe(self, name: str, objective: Objective = "sft", **settings: Any) -> Recipe:
        config = RecipeConfig(name=name, **{"items": 60, "shape": ROOM, **settings})
        return RECIPES[name](config, str(self.folder), Prompts(), objective)

    def record(self, index: int) -> Record:
        if index not in self._records:
            self._records[index] = self.world.record("train", index)
        return self._records[index]

    def draw(self, recipe: Recipe, index: int, seed: int = 0) -> Drawn:
        return recipe(self.record(index), np.random.default_rng((seed, index)))

    def asked(self, recipe: Recipe, sample: Sample) -> list[Asked]:
        tokenizer = recipe.family.tokenizer
        found = []
        for branch in (branch for group in sample.groups for branch in group):
            text = tokenizer.decode(list(branch.tokens), skip_special_tokens=False)
            marked = [t for t, weight in zip(branch.tokens, branch.weights, strict=True) if weight]
            taught = tokenizer.decode(marked, skip_special_tokens=False)
            match = CONFIDENCE.search(text)
            if match:
                found.append(Asked(match[1], match[2], int(match[3]), branch.role, taught))
            else:
                match = ANSWER.match(text)
                assert match, text
                found.append(Asked(match[1], match[2], None, branch.role, taught))
        return found


def items_of(record: Record) -> dict[str, Item]:
    return {item.question: item for item in record.items}


def object_masks(record: Record) -> list[np.ndarray]:
    height, width = pixels(record).shape[:2]
    return [decode_mask(region.mask, height, width) for region in record.regions]


def box_mask(record: Record, index: int) -> np.ndarray:
    mask = np.zeros(pixels(record).shape[:2], bool)
    x0, y0, x1, y1 = (int(edge) for edge in record.regions[index].box)
    mask[y0:y1, x0:x1] = True
    return mask


def pixels(record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.images[0])).convert("RGB"))


def only_picture(sample: Sample) -> Picture:
    (picture,) = sample.pictures
    return picture
