"""`evidence`: right and wrong responses, labelled with the probability of being right given what is still visible."""

from __future__ import annotations

from collections import Counter

import numpy as np
from jaxtyping import Bool
from PIL import Image

from csp_jax.data.recipes.base import Asker, Bundle, Drawn, Recipe
from csp_jax.records import Item, Record


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
        asker = Asker(self.family, self.prompts, picture)
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
