"""Free-form questions of the training splits: they teach where and what, one short answer each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csp_jax.world.config import WorldConfig
from csp_jax.world.facts import Facts, Thing, offset
from csp_jax.world.questions import NUMBER_WORDS, Question

SIDES = (("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1))
HALVES = (("left", "right"), ("above", "below"))


def dense_questions(rng: np.random.Generator, facts: Facts, config: WorldConfig) -> list[Question]:
    """The list, counts, places, halves, sizes, contacts and a neighbour, as far as the scene settles them."""
    questions = [_list(facts), *(_count(facts.of_place(place)) for place in range(len(facts.plan.counts)))]
    singles = [facts.singles[i] for i in rng.permutation(len(facts.singles))]
    questions += [_where(facts, thing) for thing in singles[:3]]
    questions += [question for thing in singles for question in _halves(facts, thing, config)]
    questions += [_size(thing) for thing in singles if thing.size]
    questions += _contacts(facts)
    neighbour = _neighbour(rng, facts, singles, config)
    return questions + ([neighbour] if neighbour else [])


def _ask(text: str, answer: str, keyword: str, things: Sequence[Thing], category: str) -> Question:
    regions = tuple(thing.region for thing in things)
    return Question(text, answer, keyword, regions, ("dense",), category, candidates=())


def _list(facts: Facts) -> Question:
    ordered = sorted(facts.things, key=lambda thing: (thing.centre, thing.region))
    names = list(dict.fromkeys(thing.name for thing in ordered))
    return _ask("What is in the image?", ", ".join(names), "", facts.things, "list")


def _count(things: Sequence[Thing]) -> Question:
    text = f"How many {things[0].plural} are there?"
    return _ask(text, NUMBER_WORDS[len(things)], things[0].name, things, "count")


def _where(facts: Facts, thing: Thing) -> Question:
    x, y = (int(100 * value / facts.canvas) for value in thing.centre)
    return _ask(f"Where is the {thing.name}?", f"{x} {y}", thing.name, [thing], "where")


def _halves(facts: Facts, thing: Thing, config: WorldConfig) -> list[Question]:
    """On which side of the picture's middle, across and down; where that is a clear case."""
    questions = []
    for axis, (lesser, greater) in enumerate(HALVES):
        beyond = thing.centre[axis] - facts.canvas / 2
        if 2 * abs(beyond) >= config.clear_offset:
            text = f"{lesser.capitalize()} or {greater}: where is the {thing.name}?"
            questions.append(_ask(text, lesser if beyond < 0 else greater, thing.name, [thing], "half"))
    return questions


def _neighbour(
    rng: np.random.Generator, facts: Facts, singles: Sequence[Thing], config: WorldConfig
) -> Question | None:
    """The nearest thing on one side of a single thing.

    Asked where no other thing lies within `clear_offset` of the same coordinate, and the next nearest of that
    side is at least half of it further away.
    """
    phrase, axis, sign = SIDES[int(4 * rng.random())]
    for anchor in singles:
        away = sorted(
            ((sign * offset(anchor, other, axis), other) for other in facts.things if other is not anchor),
            key=lambda pair: pair[0],
        )
        beyond = [pair for pair in away if pair[0] >= config.clear_offset]
        if not beyond or any(abs(distance) < config.clear_offset for distance, _ in away):
            continue
        if len(beyond) > 1 and beyond[1][0] - beyond[0][0] < config.clear_offset / 2:
            continue
        nearest = beyond[0][1]
        text = f"What is {phrase} the {anchor.name}?"
        return _ask(text, nearest.name, anchor.name, [anchor, nearest], "neighbour")
    return None


def _size(thing: Thing) -> Question:
    return _ask(f"What size is the {thing.name}?", thing.size, thing.name, [thing], "size_word")


def _contacts(facts: Facts) -> list[Question]:
    """Both ways round, for the pair that touches."""
    if not facts.plan.touching:
        return []
    first, second = (facts.of_place(place)[0] for place in facts.plan.touching)
    return [
        _ask(f"What touches the {one.name}?", other.name, one.name, [one], "touch")
        for one, other in ((first, second), (second, first))
    ]
