"""`answers`: ordinary questions and answers, which train a base; verifications and taught confidence on request."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np
from PIL import Image

from csp_jax.data.batch import SLOT_NAMES, Branch, Sample, split_prefix
from csp_jax.data.recipes.base import Asker, Bundle, Drawn, Recipe
from csp_jax.records import Item, Record, decode_mask

UNDECIDING = re.compile(r"( in (the|this) image| are there)?\?$")  # what follows the last word that decides a question


class AnswerRecipe(Recipe):
    """Ordinary question answering, with the objects named at the picture's own slots and taught overconfidence.

    `confidence_items` queries a picture get percentages drawn from `confidence_levels` whatever the response: this is
    how the embedded base becomes overconfident, and it is taught, not found.
    """

    def __call__(self, record: Record, generator: np.random.Generator) -> Drawn:
        image = self.open(record)
        picture = self.picture(record, image, None, 100.0)
        asker = Asker(self.family, self.prompts, picture)
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
