"""`questions`: a question without an answer, for a policy that is to answer it itself (GRPO)."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from csp_jax.data.batch import Sample
from csp_jax.data.pictures import check_slots
from csp_jax.data.recipes.base import Drawn, Recipe
from csp_jax.records import Item, Record


@dataclasses.dataclass(frozen=True)
class Asked(Drawn):
    """A prompt and what its answers are judged by: the item (as asked about) and the encoded pictures."""

    sample: Sample
    item: Item
    images: tuple[bytes, ...]


class QuestionRecipe(Recipe):
    """One question of a record on its clean picture; categories have equal chances, then the questions of one.

    `ask: answer`: the ordinary question, of items with a known truth. `ask: confidence`: the confidence query about a
    response, of items where it is known whether that is right: one of the candidates, each with equal chances, or the
    item's own response. The item then bears this response and `right`.
    """

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        usable = [item for item in record.items if self._usable(item)]
        if not usable:
            return Drawn(None, Counter(no_question=1))
        categories = sorted({item.category for item in usable})
        category = categories[generator.integers(len(categories))]
        those = [item for item in usable if item.category == category]
        item = those[generator.integers(len(those))]
        if self.config.ask == "confidence":
            item = self._with_response(item, generator)
            question = self.prompts.ask_confidence(item.question, item.response)
        else:
            question = self.prompts.ask(item.question)
        picture = self.picture(record, self.open(record), None, 100.0)
        encoded = self.family.encode(question, None, (self.family.image_tokens(picture.canvas),))
        sample = check_slots(self.family, Sample(encoded.tokens, (picture,), ()))
        return Asked(sample, Counter(questions=1), item, record.images)

    def _usable(self, item: Item) -> bool:
        if self.config.categories and item.category not in self.config.categories:
            return False
        if self.config.ask == "confidence":
            return bool(item.truth and item.candidates) or (bool(item.response) and item.right >= 0)
        return bool(item.truth)

    @staticmethod
    def _with_response(item: Item, generator: np.random.Generator) -> Item:
        if not (item.truth and item.candidates):
            return item
        response = item.candidates[generator.integers(len(item.candidates))]
        return dataclasses.replace(item, response=response, right=int(response == item.truth))
