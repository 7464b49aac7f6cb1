"""Free-form questions of the training splits: they teach where and what, one short answer each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csp_jax.world.config import WorldConfig
from csp_jax.world.facts import Facts, Thing, offset
from csp_jax.world.questions import NUMBER_WORDS, Question

SIDES = (("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1))


def dense_questions(rng: np.random.Generator, facts: Facts, config: WorldConfig) -> list[Question]:
    """Two places, the list, a count, and a neighbour or a size, as far as the scene settles them."""
    questions = [_list(facts), _count(rng, facts)]
    order = rng.permutation(len(facts.singles))
    singles = [facts.singles[i] for i in order]
    questions += [_where(facts, thing) for thing in singles[:2]]
    last = [_neighbour(rng, facts, singles, config), _size(singles)]
    if rng.random() < 0.5:
        last.reverse()
    questions += [question for question in last if question is not None][:1]
    return questions


def _ask(text: str, answer: str, keyword: str, things: Sequence[Thing], category: str) -> Question:
    regions = tuple(thing.region for thing in things)
    return Question(text, answer, keyword, regions, ("dense",), category, candidates=())


def _list(facts: Facts) -> Question:
    ordered = sorted(facts.things, key=lambda thing: (thing.centre, thing.region))
    names = list(dict.fromkeys(thing.name for thing in ordered))
    return _ask("What is in the image?", ", ".join(names), "", facts.things, "list")


def _count(rng: np.random.Generator, facts: Facts) -> Question:
    place = facts.plan.counted
    if place < 0:
        place = int(rng.random() * len(facts.plan.classes))
    things = facts.of_place(place)
    text = f"How many {things[0].plural} are there?"
    return _ask(text, NUMBER_WORDS[len(things)], things[0].name, things, "count")


def _where(facts: Facts, thing: Thing) -> Question:
    x, y = (int(100 * value / facts.canvas) for value in thing.centre)
    return _ask(f"Where is the {thing.name}?", f"{x} {y}", thing.name, [thing], "where")


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


def _size(singles: Sequence[Thing]) -> Question | None:
    for thing in singles:
        if thing.size:
            return _ask(f"What size is the {thing.name}?", thing.size, thing.name, [thing], "size_word")
    return None
