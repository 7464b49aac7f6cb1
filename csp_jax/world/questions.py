"""Yes/no questions about a scene, with their true answers; every form has "yes" as often as "no"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csp_jax.records import Item
from csp_jax.text import existence_question
from csp_jax.world.catalogue import ObjectClass
from csp_jax.world.config import WorldConfig
from csp_jax.world.facts import Facts, Thing, gap, offset
from csp_jax.world.plan import Statistics

SUBSETS = ("random", "popular", "adversarial")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
YES_NO = ("yes", "no")
# category -> (axis, phrase where the first object has the lesser coordinate, the opposite phrase)
RELATIONS = {
    "left_of": (0, "to the left of", "to the right of"),
    "above": (1, "above", "below"),
}


@dataclass(frozen=True)
class Question:
    """A question before it is numbered; `candidates` empty: free-form."""

    text: str
    truth: str
    keyword: str
    regions: tuple[int, ...]
    subsets: tuple[str, ...]
    category: str
    candidates: tuple[str, ...] = YES_NO

    def item(self, identifier: str) -> Item:
        """The record's item: the response is the true answer, rejected is the other candidate."""
        others = [candidate for candidate in self.candidates if candidate != self.truth]
        return Item(
            id=identifier,
            question=self.text,
            response=self.truth,
            keyword=self.keyword,
            regions=self.regions,
            truth=self.truth,
            candidates=self.candidates,
            right=1,
            subsets=self.subsets,
            category=self.category,
            rejected=others[0] if others else "",
        )


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _shuffled(rng: np.random.Generator, values: Sequence) -> list:
    return [values[i] for i in rng.permutation(len(values))]


class Existence:
    """ "Is there a cat in the image?" with negatives chosen as POPE chooses them."""

    def __init__(
        self,
        config: WorldConfig,
        classes: Sequence[ObjectClass],
        usable: Sequence[int],
        statistics: Statistics,
    ):
        self.config, self.classes, self.usable, self.statistics = config, classes, usable, statistics

    def training(self, rng: np.random.Generator, facts: Facts) -> list[Question]:
        """Up to three present classes, each with a negative of another subset."""
        present = _shuffled(rng, facts.plan.classes)[:3]
        used: set[int] = set()
        questions = []
        for index, subset in zip(present, _shuffled(rng, SUBSETS)):
            questions.append(self._present(facts, index, (subset,)))
            for negative in self._negatives(rng, facts, subset, 1, used):
                used.add(negative)
                questions.append(self._absent(negative, (subset,)))
        return questions

    def evaluation(self, rng: np.random.Generator, facts: Facts) -> list[Question]:
        """Up to two present classes, which count in every subset, and as many negatives per subset."""
        present = _shuffled(rng, facts.plan.classes)[:2]
        negatives: dict[int, list[str]] = {}
        for subset in SUBSETS:
            for index in self._negatives(rng, facts, subset, len(present), set()):
                negatives.setdefault(index, []).append(subset)
        questions = [self._present(facts, index, SUBSETS) for index in present]
        return questions + [self._absent(index, tuple(subsets)) for index, subsets in negatives.items()]

    def _negatives(self, rng: np.random.Generator, facts: Facts, subset: str, number: int, used: set[int]) -> list[int]:
        present = facts.plan.classes
        absent = [index for index in self.usable if index not in present and index not in used]
        if subset == "popular":
            absent = self.statistics.popular(absent, self.config.popular_pool)
        elif subset == "adversarial":
            absent = self.statistics.adversarial(absent, present, self.config.adversarial_pool)
        return _shuffled(rng, absent)[:number]

    def _present(self, facts: Facts, index: int, subsets: tuple[str, ...]) -> Question:
        regions = tuple(thing.region for thing in facts.things if thing.index == index)
        return self._ask(index, "yes", regions, subsets)

    def _absent(self, index: int, subsets: tuple[str, ...]) -> Question:
        return self._ask(index, "no", (), subsets)

    def _ask(self, index: int, truth: str, regions: tuple[int, ...], subsets: tuple[str, ...]) -> Question:
        name = self.classes[index].name
        return Question(existence_question(name), truth, name, regions, subsets, "existence")


def number_questions(rng: np.random.Generator, facts: Facts) -> list[Question]:
    """About the scene's counted class: the true number, and one that is off by one."""
    place = facts.plan.counted
    if place < 0:
        return []
    things, true = facts.of_place(place), facts.plan.counts[place]
    wrong = {1: 2, 4: 3}.get(true) or true + (1 if rng.random() < 0.5 else -1)
    name, plural = things[0].name, things[0].plural
    regions = tuple(thing.region for thing in things)
    questions = []
    for number in (true, wrong):
        text = f"Are there {NUMBER_WORDS[number]} {plural} in the image?"
        if number == 1:
            text = f"Is there only one {name} in the image?"
        questions.append(Question(text, _yes(number == true), name, regions, ("attribute",), "number"))
    return questions


def size_questions(rng: np.random.Generator, facts: Facts, forms: int) -> list[Question]:
    """One large and one small object, each asked with the same `forms` of ("large", "small")."""
    large = [thing for thing in facts.singles if thing.size == "large"]
    small = [thing for thing in facts.singles if thing.size == "small"]
    if not large or not small:
        return []
    pair = [things[int(rng.random() * len(things))] for things in (large, small)]
    questions = []
    for size in _shuffled(rng, ("large", "small"))[:forms]:
        for thing in pair:
            text = f"Is the {thing.name} {size} in this image?"
            truth = _yes(thing.size == size)
            questions.append(Question(text, truth, thing.name, (thing.region,), ("attribute",), "size"))
    return questions


def _pairs(rng: np.random.Generator, facts: Facts) -> list[tuple[Thing, Thing]]:
    """All pairs of single things, in random order, each either way round with equal chance."""
    things = facts.singles
    pairs = [(a, b) for i, a in enumerate(things) for b in things[i + 1 :]]
    turned = rng.random(len(pairs)) < 0.5
    return _shuffled(rng, [(b, a) if turn else (a, b) for (a, b), turn in zip(pairs, turned)])


def contact_questions(rng: np.random.Generator, facts: Facts, config: WorldConfig) -> list[Question]:
    """A touching pair and one clearly apart, where the scene has both; else one of them at equal rates."""
    pairs = _pairs(rng, facts)
    touching = [p for p in pairs if facts.plan.touching and {p[0].place, p[1].place} == set(facts.plan.touching)]
    apart = [p for p in pairs if gap(*p) >= config.clear_gap]
    if len(pairs) == 1:
        # Two singles: the scene settles the answer, so the commoner kind is asked about less often.
        share = config.contact if touching else 1 - config.contact
        if rng.random() * share > min(config.contact, 1 - config.contact):
            return []
    elif not touching or not apart:
        return []
    return [
        Question(
            f"Is there direct contact between the {first.name} and the {second.name}?",
            answer,
            first.name,
            (first.region, second.region),
            ("relation",),
            "contact",
        )
        for answer, chosen in (("yes", touching), ("no", apart))
        for first, second in chosen[:1]
    ]


def position_questions(
    rng: np.random.Generator, facts: Facts, config: WorldConfig, category: str, number: int
) -> list[Question]:
    """ "Is the cat to the left of the mug?" about up to `number` clear pairs, answers alternating."""
    axis, lesser, greater = RELATIONS[category]
    clear = [pair for pair in _pairs(rng, facts) if abs(offset(*pair, axis)) >= config.clear_offset]
    truth = bool(rng.random() < 0.5)
    questions = []
    for first, second in clear[:number]:
        phrase = lesser if (offset(first, second, axis) > 0) == truth else greater
        questions.append(
            Question(
                f"Is the {first.name} {phrase} the {second.name}?",
                _yes(truth),
                first.name,
                (first.region, second.region),
                ("relation",),
                category,
            )
        )
        truth = not truth
    return questions
