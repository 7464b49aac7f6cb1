"""The paper's data: `paper` as printed, `materialized` as prepared offline, `original` without confidence."""

from __future__ import annotations

from collections import Counter

import numpy as np

from csp_jax.data.batch import CHOSEN, REJECTED
from csp_jax.data.recipes.base import Asker, Bundle, Drawn, Recipe
from csp_jax.families.interface import open_image
from csp_jax.records import Record


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
        region = None if self.config.region == "global" else self.region_mask(record, image.size, first.regions)
        picture = self.picture(record, image, region, percent)
        asker = Asker(self.family, self.prompts, picture)
        order = generator.permutation(len(same))[: self.config.items]
        asked = [self.label_bundle(asker, same[i].question, same[i].response, percent, counts) for i in order]
        bundles = [bundle for bundle in asked if bundle] + self.retention(asker, record.items, generator)
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
        asker = Asker(self.family, self.prompts, picture)
        bundle = self.label_bundle(asker, item.question, item.response, round(item.confidence), counts)
        return self.sample(picture, [bundle] if bundle else [], counts)


class OriginalRecipe(Recipe):
    """Chosen and rejected answers as they are, no noise, no confidence query."""

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        usable = [item for item in record.items if item.right == 1 and item.rejected]
        picture = self.picture(record, self.open(record), None, 100.0)
        asker = Asker(self.family, self.prompts, picture)
        bundles: list[Bundle] = []
        for i in generator.permutation(len(usable))[: self.config.items]:
            item = usable[i]
            if self.objective == "sft":
                bundles.append((asker.answer(item.question, item.response),))
            else:
                chosen = asker.answer(item.question, item.response, role=CHOSEN)
                bundles.append((chosen, asker.answer(item.question, item.rejected, role=REJECTED)))
        return self.sample(picture, bundles, Counter())
