"""From a record to what a model is shown and taught: which region is buried, who is asked what, with which label.

Every recipe is a callable `(record, generator) -> Drawn`; it runs in data workers (no jax).

`answers`   ordinary questions and answers (trains a base); with taught confidence if asked for.
`paper`     [A] as printed: right responses about the buried object, label c.
`evidence`  ours: right and wrong responses, label = probability of being right given what is still visible.
`materialized`  `paper` on pictures that were noised when the data set was made, each with its label.
`original`  plain chosen / rejected answers without the confidence query ([A] 4.3.2, "original RLAIF").
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections import Counter
from collections.abc import Iterable
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
    SLOT_NAMES,
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

UNDECIDING = re.compile(r"( in (the|this) image| are there)?\?$")  # what follows the last word that decides a question
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
    """Writes questions and answers as token sequences of one family."""

    def __init__(self, family: HostFamily, prompts: Prompts, slots: tuple[int, ...]):
        self.family, self.prompts, self.slots = family, prompts, slots

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


class Recipe:
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

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        raise NotImplementedError

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

    def retention(self, asker: Asker, record: Record, generator: np.random.Generator) -> list[Bundle]:
        """Ordinary questions and answers beside the confidence queries, so that answering is kept."""
        usable = [item for item in record.items if item.candidates and item.right == 1]
        count = min(self.config.retention_items, len(usable))
        chosen = generator.permutation(len(usable))[:count]
        return [(asker.answer(usable[i].question, usable[i].response),) for i in chosen]

    def draw_percent(self, generator: np.random.Generator) -> int:
        """A confidence label, uniform over 0..100 or over its grid."""
        if self.config.labels == "grid":
            return int(generator.integers(0, 100 // self.config.grid + 1)) * self.config.grid
        return int(generator.integers(0, 101))

    def region_mask(
        self, record: Record, image: Image.Image, indices: Iterable[int]
    ) -> Bool[np.ndarray, "height width"]:
        """The union of regions, as masks, as their boxes, or as squares around them."""
        total = np.zeros((image.height, image.width), bool)
        for index in indices:
            region = record.regions[index]
            if self.config.region == "mask":
                total |= decode_mask(region.mask, image.height, image.width)
                continue
            x0, y0, x1, y1 = (round(edge) for edge in region.box)
            if self.config.region == "square":
                x0, y0, x1, y1 = square_around((x0, y0, x1, y1), image.width, image.height)
            total[y0:y1, x0:x1] = True
        return total


class AnswerRecipe(Recipe):
    """Ordinary question answering, with the objects named at the picture's own slots and taught overconfidence.

    `confidence_items` queries a picture get percentages drawn from `confidence_levels` whatever the response: this is
    how the embedded base becomes overconfident, and it is taught, not found.
    """

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        image = self.open(record)
        picture = self.picture(record, image, None, 100.0)
        asker = Asker(self.family, self.prompts, (self.family.image_tokens(picture.canvas),))
        categories = self.config.categories
        items = [item for item in record.items if item.right == 1 and (not categories or item.category in categories)]
        order = generator.permutation(len(items))[: self.config.items]
        bundles: list[Bundle] = [self.answers(asker, items[i]) for i in order]
        asked = [item for item in items if len(item.candidates) > 1]
        levels, odds = zip(*self.config.confidence_levels.items()) if self.config.confidence_levels else ((), ())
        for _ in range(self.config.verify_items if asked else 0):
            item = asked[generator.integers(len(asked))]
            bundles.append(self.verification(asker, item, item.candidates[generator.integers(len(item.candidates))]))
        for _ in range(self.config.confidence_items if asked and levels else 0):
            item = asked[generator.integers(len(asked))]
            response = item.candidates[generator.integers(len(item.candidates))]
            percent = int(generator.choice(levels, p=np.array(odds) / sum(odds)))
            bundles.append((asker.confidence(item.question, response, percent),))
        drawn = self.sample(picture, [bundles[i] for i in generator.permutation(len(bundles))], Counter())
        if drawn.sample is None or not self.config.name_slots:
            return drawn
        named = dataclasses.replace(drawn.sample, slot_names=self.slot_names(record, image, drawn.sample))
        return Drawn(named, drawn.counts)

    def answers(self, asker: Asker, item: Item) -> Bundle:
        """The answer in its place, and for items with a keyword also right behind the last word that decides it.

        Answering early is never asked for; it is a shorter way on which a model that starts from nothing finds
        out that the question has to be compared with the picture.
        """
        early = UNDECIDING.sub("", item.question) if self.config.early_answers and item.keyword else None
        return self.answer_twice(asker, item.question, early, item.response)

    def verification(self, asker: Asker, item: Item, response: str) -> Bundle:
        """Whether a response is right; early, this can be said right behind it."""
        question = self.prompts.ask_verify(item.question, response)
        early = question[: question.rindex(response) + len(response)] if self.config.early_answers else None
        return self.answer_twice(asker, question, early, "yes" if response == item.truth else "no")

    def answer_twice(self, asker: Asker, question: str, early: str | None, response: str) -> Bundle:
        """The answer behind the question and, if `early` is what the question begins with, also behind that."""
        answer = asker.answer(question, response)
        if early is None:
            return (answer,)
        cut = asker.answer(early, response)
        place = split_prefix((answer.tokens, cut.tokens), 0)
        said = [token for token, weight in zip(answer.tokens, answer.weights) if weight][:-1]  # without the end
        if not self.family.tokenizer.decode(said[:1]).strip():
            said = said[1:]  # a blank before digits says nothing
        return (answer, Branch((*answer.tokens[:place], *said), (0.0,) * place + (1.0,) * len(said)))

    def slot_names(self, record: Record, image: Image.Image, sample: Sample) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """At each picture slot the name of the object that covers most of it (`scene` where none does).

        With it come the answers to the free-form items of `slot_facts` about this object (its size, for one).
        Of each word the first token counts.
        """
        slots = [i for i, token in enumerate(sample.prompt) if token == self.family.image_token]
        side = round(len(slots) ** 0.5)
        height, width = sample.pictures[0].canvas.shape[:2]
        cover = np.zeros((len(record.regions) + 1, side * side))
        cover[0] = 0.25  # an object names a slot when it covers a quarter of it and more than any other
        for number, region in enumerate(record.regions):
            mask = self.family.canvas_mask(decode_mask(region.mask, image.height, image.width))
            cells = mask.reshape(side, height // side, side, width // side).mean(axis=(1, 3))
            cover[number + 1] = cells.reshape(-1)
        words = [["scene"], *([region.keyword] for region in record.regions)]
        for item in record.items:
            if item.category in self.config.slot_facts:
                for index in item.regions:
                    words[index + 1].append(item.response)
        encode = self.family.tokenizer.encode
        tokens = [tuple(encode(f" {word}", add_special_tokens=False).ids[0] for word in those) for those in words]
        return tuple(
            (slot, tokens[which][:SLOT_NAMES]) for slot, which in zip(slots, cover.argmax(axis=0), strict=True)
        )


class PaperRecipe(Recipe):
    """[A] 3.2: right responses about an object that is buried to c, label c; items without an object are skipped."""

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        counts: Counter = Counter()
        asked_about = [item for item in record.items if item.candidates or self.config.free_form]
        usable = [item for item in asked_about if item.regions and item.right == 1]
        counts["skipped_without_object"] += sum(not item.regions for item in asked_about)
        if not usable:
            return Drawn(None, counts)
        first = usable[generator.integers(len(usable))]
        same = [item for item in usable if set(item.regions) & set(first.regions)]
        percent = self.draw_percent(generator)
        image = self.open(record)
        region = None if self.config.region == "global" else self.region_mask(record, image, first.regions)
        picture = self.picture(record, image, region, percent)
        asker = Asker(self.family, self.prompts, (self.family.image_tokens(picture.canvas),))
        order = generator.permutation(len(same))[: self.config.items]
        asked = [self.label_bundle(asker, same[i].question, same[i].response, percent, counts) for i in order]
        bundles = [bundle for bundle in asked if bundle] + self.retention(asker, record, generator)
        return self.sample(picture, bundles, counts)


class MaterializedRecipe(Recipe):
    """One of a record's perturbed pictures, shown as it is, and the confidence that it was made for as the label."""

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        counts: Counter = Counter()
        usable = [item for item in record.items if item.perturbed_image and item.right == 1]
        if not usable:
            counts["skipped_without_perturbed_image"] += 1
            return Drawn(None, counts)
        item = usable[generator.integers(len(usable))]
        picture = self.picture(record, open_image(item.perturbed_image, item.id), None, 100.0)
        asker = Asker(self.family, self.prompts, (self.family.image_tokens(picture.canvas),))
        bundle = self.label_bundle(asker, item.question, item.response, round(item.confidence), counts)
        return self.sample(picture, [bundle] if bundle else [], counts)


class OriginalRecipe(Recipe):
    """Chosen and rejected answers as they are, no noise, no confidence query."""

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        usable = [item for item in record.items if item.right == 1 and item.rejected]
        picture = self.picture(record, self.open(record), None, 100.0)
        asker = Asker(self.family, self.prompts, (self.family.image_tokens(picture.canvas),))
        bundles: list[Bundle] = []
        for i in generator.permutation(len(usable))[: self.config.items]:
            item = usable[i]
            if self.objective == "sft":
                bundles.append((asker.answer(item.question, item.response),))
            else:
                chosen = asker.answer(item.question, item.response, role=CHOSEN)
                bundles.append((chosen, asker.answer(item.question, item.rejected, role=REJECTED)))
        return self.sample(picture, bundles, Counter())


def evidence_label(percent: float, right: bool, prior: float) -> int:
    """`c [response is right] + (1 - c) prior`, as a whole percentage (design: recipes)."""
    return round(percent * right + (100 - percent) * prior)


class EvidenceRecipe(Recipe):
    """Right and wrong responses; the label is the probability of being right given what is still visible.

    One region of the picture is buried (or none, with probability `clean`). An item is affected if the region is its
    key object, or stands in for it: an item without an object is affected with probability `1 - distractor` by a
    region that is not its own, so that noise says nothing about presence. What is not affected keeps its label.
    """

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        counts: Counter = Counter()
        items = [item for item in record.items if item.truth and len(item.candidates) > 1]
        if not items:
            counts["skipped_without_candidates"] += 1
            return Drawn(None, counts)
        image = self.open(record)
        buried, region = self.choose_region(record, image, items, generator)
        percent = 100 if region is None and not buried else self.draw_percent(generator)
        picture = self.picture(record, image, region, percent)
        asker = Asker(self.family, self.prompts, (self.family.image_tokens(picture.canvas),))
        bundles: list[Bundle] = []
        for i in generator.permutation(len(items)):
            if len(bundles) == self.config.items:
                break
            share = self.visible(record, image, items[i], buried, region, percent, generator)
            if share is None:
                counts["half_covered"] += 1
                continue
            bundle = self.both_responses(asker, items[i], share, counts)
            bundles += [bundle] if bundle else []
        return self.sample(picture, bundles + self.retention(asker, record, generator), counts)

    def both_responses(self, asker: Asker, item: Item, share: float, counts: Counter) -> Bundle:
        """Every candidate as the response, with its label; the queries share what they begin with."""
        prior = 1 / len(item.candidates)
        branches: Bundle = ()
        for response in item.candidates:
            label = evidence_label(share, response == item.truth, prior)
            branches += self.label_bundle(asker, item.question, response, label, counts) or ()
        return branches

    def choose_region(
        self, record: Record, image: Image.Image, items: list[Item], generator: np.random.Generator
    ) -> tuple[frozenset[int], Bool[np.ndarray, "height width"] | None]:
        """The regions that are buried (empty: a place without an object) and their pixels (None: a clean picture)."""
        if generator.random() < self.config.clean or not record.regions:
            return frozenset(), None
        if self.config.region == "global":
            return frozenset(range(len(record.regions))), None
        objects = sorted({item.regions for item in items if item.regions}, key=lambda r: (len(r), r))
        key = objects[generator.integers(len(objects))]
        region = self.region_mask(record, image, key)
        if generator.random() < self.config.elsewhere:
            moved = self.move_region(record, image, region, generator)
            if moved is not None:
                return frozenset(), moved
        return frozenset(key), region

    def move_region(
        self,
        record: Record,
        image: Image.Image,
        region: Bool[np.ndarray, "height width"],
        generator: np.random.Generator,
    ) -> Bool[np.ndarray, "height width"] | None:
        """The same shape at a place that covers (nearly) no object, or None if eight tries find none."""
        occupied = self.region_mask(record, image, range(len(record.regions)))
        rows, columns = np.where(region.any(axis=1))[0], np.where(region.any(axis=0))[0]
        patch = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        for _ in range(8):
            top = int(generator.integers(0, region.shape[0] - patch.shape[0] + 1))
            left = int(generator.integers(0, region.shape[1] - patch.shape[1] + 1))
            moved = np.zeros_like(region)
            moved[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
            if (moved & occupied).sum() <= 0.1 * moved.sum():
                return moved
        return None

    def visible(
        self,
        record: Record,
        image: Image.Image,
        item: Item,
        buried: frozenset[int],
        region: Bool[np.ndarray, "height width"] | None,
        percent: int,
        generator: np.random.Generator,
    ) -> float | None:
        """Percent of the evidence for an item that is left; None where a region is half covered by accident."""
        if not item.regions:
            return 100.0 if generator.random() < self.config.distractor else float(percent)
        if set(item.regions) <= buried:
            return float(percent)
        if region is None:
            return 100.0
        covered = 0.0
        for index in item.regions:
            own = self.region_mask(record, image, (index,))
            covered = max(covered, float((own & region).sum() / max(own.sum(), 1)))
        if covered >= 0.9:
            return float(percent)
        return 100.0 if covered <= 0.1 else None


RECIPES: dict[str, type[Recipe]] = {
    "answers": AnswerRecipe,
    "paper": PaperRecipe,
    "evidence": EvidenceRecipe,
    "materialized": MaterializedRecipe,
    "original": OriginalRecipe,
}
