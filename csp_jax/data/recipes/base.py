"""What all recipes share: the words put to a model, regions, the prompt that branches share, grouping."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image

from csp_jax.config import RecipeConfig
from csp_jax.data.batch import (
    CHOSEN,
    PLAIN,
    REJECTED,
    Branch,
    Picture,
    Sample,
    merge_branches,
    split_prefix,
)
from csp_jax.data.pictures import check_slots, show
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.families.registry import open_family
from csp_jax.records import Item, Record, decode_mask
from csp_jax.text import Prompts, percent_text

Bundle = tuple[Branch, ...]
Objective = Literal["sft", "simpo"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A sample (None: nothing usable in this record) and what was counted on the way."""

    sample: Sample | None
    counts: Counter


def noise_identity(text: str) -> int:
    """A stable 32-bit identity of an example for its noise."""
    return zlib.crc32(text.encode())


class Asker:
    """Writes questions about one picture, and answers, as token sequences of a family."""

    def __init__(self, family: HostFamily, prompts: Prompts, picture: Picture):
        self.family, self.prompts, self.slots = family, prompts, (family.image_tokens(picture.canvas),)

    def _branch(self, text: str, answer: str, role: int, weight: float) -> Branch:
        encoded = self.family.encode(text, answer, self.slots)
        return Branch(encoded.tokens, tuple(weight if mark else 0.0 for mark in encoded.answer), role)

    def answer(self, question: str, answer: str, *, role: int = PLAIN, weight: float = 1.0) -> Branch:
        """The ordinary question and an answer."""
        return self._branch(self.prompts.ask(question), answer, role, weight)

    def confidence(self, question: str, response: str, percent: int, *, role: int = PLAIN) -> Branch:
        """The confidence query about a response, and the percentage that answers it."""
        return self._branch(self.prompts.ask_confidence(question, response), percent_text(percent), role, 1.0)


def group_bundles(bundles: list[Bundle], groups: int, length: int, targets: int) -> tuple[list[Bundle], int]:
    """First fit of bundles (without the prompt they share) into groups; returns groups and how many found no room."""
    filled: list[list[Branch]] = [[] for _ in range(groups)]
    room = [[length, targets] for _ in range(groups)]
    left = 0
    for bundle in bundles:
        tree = merge_branches(bundle)
        need = (len(tree.tokens), len(tree.targets))
        for group, free in zip(filled, room):
            if need[0] <= free[0] and need[1] <= free[1]:
                group.extend(bundle)
                free[0] -= need[0]
                free[1] -= need[1]
                break
        else:
            left += 1
    return [tuple(group) for group in filled if group], left


def square_around(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The square of a box's longer side about its middle, moved (and cut, if it must be) into the picture."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    left = max(0, min((x0 + x1 - side) // 2, width - side))
    top = max(0, min((y0 + y1 - side) // 2, height - side))
    return left, top, min(left + side, width), min(top + side, height)


def in_turns(items: Sequence[Item], generator: np.random.Generator) -> list[Item]:
    """Items in random order in which categories take turns, so that the many of one do not drown the few of another."""
    taken: Counter = Counter()
    turns = []
    for i in generator.permutation(len(items)):
        turns.append((taken[items[i].category], items[i]))
        taken[items[i].category] += 1
    return [item for _, item in sorted(turns, key=lambda turn: turn[0])]


class Recipe(abc.ABC):
    """Shared by all recipes: pictures, regions, prompt and grouping."""

    def __init__(self, config: RecipeConfig, checkpoint: str, prompts: Prompts, objective: Objective):
        self.config, self.checkpoint, self.prompts, self.objective = config, checkpoint, prompts, objective
        self._family: HostFamily | None = None

    @property
    def family(self) -> HostFamily:
        """Opened where it is used, so that the recipe travels to workers as plain data."""
        if self._family is None:
            self._family = open_family(Path(self.checkpoint))
        return self._family

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_family": None}

    @abc.abstractmethod
    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        """What this record gives this time."""

    def open(self, record: Record) -> Image.Image:
        """The record's one picture."""
        if len(record.images) != 1:
            raise UserError("recipes take one picture a record", field=f"record {record.id}", value=len(record.images))
        return open_image(record.images[0], record.image_id)

    def picture(
        self,
        record: Record,
        image: Image.Image,
        region: Bool[np.ndarray, "height width"] | None,
        confidence: float,
    ) -> Picture:
        """The picture with a region to bury."""
        buried = region if region is not None else self.config.region == "global" and confidence < 100
        return show(self.family, image, buried, confidence, noise_identity(record.id))

    def one_regime(self, bundles: list[Bundle], counts: Counter) -> list[Bundle]:
        """The bundles of the commonest rotary regime (see `HostFamily.regime`); the others are counted and left out."""
        regimes = [self.family.regime(max(len(b.tokens) for b in bundle), train=True) for bundle in bundles]
        if len(set(regimes)) < 2:
            return bundles
        ((common, kept),) = Counter(regimes).most_common(1)
        counts["bundles_of_another_regime"] += len(bundles) - kept
        return [bundle for bundle, regime in zip(bundles, regimes) if regime == common]

    def sample(self, picture: Picture, bundles: list[Bundle], counts: Counter) -> Drawn:
        """Bundles of full sequences -> a sample whose prompt is what all of them share."""
        bundles = self.one_regime(bundles, counts)
        sequences = [branch.tokens for bundle in bundles for branch in bundle]
        if not sequences:
            return Drawn(None, counts)
        image_token = self.family.image_token
        last_slot = max(i for i, token in enumerate(sequences[0]) if token == image_token)
        shared = min(split_prefix(sequences, last_slot + 1), last_slot + 2)
        stripped = [
            tuple(dataclasses.replace(b, tokens=b.tokens[shared:], weights=b.weights[shared:]) for b in bundle)
            for bundle in bundles
        ]
        shape = self.config.shape
        if shape.samples > 1:  # the row's groups are filled when it is known who shares it
            fitting = [group_bundles([bundle], 1, shape.length, shape.targets) for bundle in stripped]
            groups, left = [group for found, _ in fitting for group in found], sum(missed for _, missed in fitting)
        else:
            groups, left = group_bundles(stripped, shape.groups, shape.length, shape.targets)
        if left:
            counts["bundles_left_over"] += left
        return Drawn(check_slots(self.family, Sample(sequences[0][:shared], (picture,), tuple(groups))), counts)

    def label_bundle(self, asker: Asker, question: str, response: str, percent: int, counts: Counter) -> Bundle | None:
        """SFT: the label. SimPO: the label against its mirror; 50% has none and is dropped."""
        if self.objective == "sft":
            return (asker.confidence(question, response, percent),)
        if percent == 50:
            counts["no_mirror"] += 1
            return None
        return (
            asker.confidence(question, response, percent, role=CHOSEN),
            asker.confidence(question, response, 100 - percent, role=REJECTED),
        )

    def retention(self, asker: Asker, items: Sequence[Item], generator: np.random.Generator) -> list[Bundle]:
        """Ordinary questions and answers beside the confidence queries, so that answering is kept."""
        asked_about = [item for item in items if item.candidates or self.config.free_form]
        usable = [item for item in asked_about if item.right == 1]
        chosen = in_turns(usable, generator)[: self.config.retention_items]
        return [(asker.answer(item.question, item.response),) for item in chosen]

    def draw_percent(self, generator: np.random.Generator) -> int:
        """A confidence label, uniform over 0..100 or over its grid."""
        if self.config.labels == "grid":
            return int(generator.integers(0, 100 // self.config.grid + 1)) * self.config.grid
        return int(generator.integers(0, 101))

    def region_masks(self, record: Record, size: tuple[int, int]) -> tuple[Bool[np.ndarray, "height width"], ...]:
        """Every region of a picture of `size` (width, height)."""
        return tuple(self.region_mask(record, size, (index,)) for index in range(len(record.regions)))

    def region_mask(
        self, record: Record, size: tuple[int, int], indices: Iterable[int]
    ) -> Bool[np.ndarray, "height width"]:
        """The union of regions, as masks, as their boxes, or as squares around them."""
        width, height = size
        total = np.zeros((height, width), bool)
        for index in indices:
            region = record.regions[index]
            if self.config.region == "mask":
                total |= decode_mask(region.mask, height, width)
                continue
            x0, y0, x1, y1 = (round(edge) for edge in region.box)
            if self.config.region == "square":
                x0, y0, x1, y1 = square_around((x0, y0, x1, y1), width, height)
            total[y0:y1, x0:x1] = True
        return total
