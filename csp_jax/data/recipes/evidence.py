"""`evidence`: right and wrong responses, labelled with the probability of being right given what is still visible."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from csp_jax.data.recipes.base import Asker, Bundle, Drawn, Recipe, in_turns
from csp_jax.records import Item, Record

Mask = Bool[np.ndarray, "height width"]


def evidence_label(percent: float, right: bool, prior: float) -> int:
    """`c [response is right] + (1 - c) prior`, as a whole percentage (design: recipes)."""
    return round(percent * right + (100 - percent) * prior)


HIDDEN, UNTOUCHED = 0.9, 0.1  # shares of an object under noise: from here on it is buried, up to here it is seen


def responses(item: Item) -> tuple[dict[str, bool], float]:
    """What can be answered, each with whether it is right (empty: unknown), and the prior of each.

    One of k candidates has the prior 1/k, a free-form answer 0. Of a preference pair the rejected one counts as
    wrong where the preferred one counts as right; neither was verified.
    """
    if len(item.candidates) > 1:
        known = {response: response == item.truth for response in item.candidates} if item.truth else {}
        return known, 1 / len(item.candidates)
    known = {item.truth: True} if item.truth else {}
    if item.response and item.right >= 0:
        known.setdefault(item.response, item.right == 1)
    if item.rejected and any(known.values()):
        known.setdefault(item.rejected, False)
    return known, 0.0


@dataclass(frozen=True)
class Burial:
    """What a picture hides: the buried regions, the pixels under noise, and those of every region of the record."""

    regions: frozenset[int] = frozenset()  # empty: none, or a place without an object
    pixels: Mask | None = None  # None: none, or all of them
    shapes: tuple[Mask, ...] = ()

    @property
    def clean(self) -> bool:
        """Is nothing hidden?"""
        return self.pixels is None and not self.regions


class EvidenceRecipe(Recipe):
    """Right and wrong responses; the label is the probability of being right given what is still visible.

    One region of the picture is buried (or none, with probability `clean`). An item is affected if the region is its
    key object, or stands in for it: an item without an object is affected with probability `1 - distractor` by a
    region that is not its own, so that noise says nothing about presence. What is not affected keeps its label.
    With `free_form`, items without candidates are asked about, too.
    """

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        counts: Counter = Counter()
        items = self.usable(record, counts)
        if not items:
            return Drawn(None, counts)
        image = self.open(record)
        burial = self.bury(record, image.size, items, generator)
        percent = 100 if burial.clean else self.draw_percent(generator)
        picture = self.picture(record, image, burial.pixels, percent)
        asker = Asker(self.family, self.prompts, picture)
        bundles: list[Bundle] = []
        for item in in_turns(items, generator):
            if len(bundles) == self.config.items:
                break
            share = self.visible(item, burial, percent, generator)
            if share is None:
                counts["half_covered"] += 1
                continue
            bundle = self.every_response(asker, item, share, counts)
            bundles += [bundle] if bundle else []
        seen = [item for item in record.items if hidden_share(item, burial) <= UNTOUCHED]
        return self.sample(picture, bundles + self.retention(asker, seen, generator), counts)

    def usable(self, record: Record, counts: Counter) -> list[Item]:
        """The items whose labels are known. Free-form ones need regions: their object is there, found or not."""
        items = []
        for item in record.items:
            if len(item.candidates) < 2 and not self.config.free_form:
                continue
            if not responses(item)[0]:
                counts["skipped_without_truth"] += 1
            elif len(item.candidates) < 2 and not item.regions:
                counts["skipped_without_object"] += 1
            else:
                items.append(item)
        if not items and not self.config.free_form:
            counts["skipped_without_candidates"] += 1
        return items

    def every_response(self, asker: Asker, item: Item, share: float, counts: Counter) -> Bundle:
        """Right and wrong responses, each with its label; the queries share what they begin with."""
        known, prior = responses(item)
        branches: Bundle = ()
        for response, right in known.items():
            label = evidence_label(share, right, prior)
            branches += self.label_bundle(asker, item.question, response, label, counts) or ()
        return branches

    def bury(self, record: Record, size: tuple[int, int], items: list[Item], generator: np.random.Generator) -> Burial:
        """Nothing, the whole picture, the key object of one of the items, or a place of its shape beside them."""
        if generator.random() < self.config.clean or not record.regions:
            return Burial()
        if self.config.region == "global":
            return Burial(frozenset(range(len(record.regions))))
        objects = sorted({item.regions for item in items if item.regions}, key=lambda r: (len(r), r))
        objects = objects or [(index,) for index in range(len(record.regions))]
        key = objects[generator.integers(len(objects))]
        shapes = self.region_masks(record, size)
        pixels = np.any([shapes[index] for index in key], axis=0)
        if generator.random() < self.config.elsewhere:
            moved = move_region(pixels, np.any(shapes, axis=0), generator)
            if moved is not None:
                return Burial(pixels=moved, shapes=shapes)
        return Burial(frozenset(key), pixels, shapes)

    def visible(self, item: Item, burial: Burial, percent: int, generator: np.random.Generator) -> float | None:
        """Percent of the evidence for an item that is left; None where a region is half covered by accident."""
        if not item.regions:
            return 100.0 if generator.random() < self.config.distractor else float(percent)
        hidden = hidden_share(item, burial)
        if hidden >= HIDDEN:
            return float(percent)
        return 100.0 if hidden <= UNTOUCHED else None


def hidden_share(item: Item, burial: Burial) -> float:
    """The share of an item's key object that lies under noise (0..1), of several the one that is hidden most."""
    if item.regions and set(item.regions) <= burial.regions:
        return 1.0
    if burial.pixels is None:
        return 0.0 if burial.clean else 1.0
    own = [burial.shapes[index] for index in item.regions]
    return max((float((shape & burial.pixels).sum() / max(shape.sum(), 1)) for shape in own), default=0.0)


def move_region(region: Mask, occupied: Mask, generator: np.random.Generator) -> Mask | None:
    """The same shape at a place that covers (nearly) no object, or None if eight tries find none."""
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
