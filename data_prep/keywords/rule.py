"""Nouns of a question by its form and by stop words: no model, no vocabulary but a few compounds."""

from __future__ import annotations

import re
from collections.abc import Iterator


def _set(text: str) -> frozenset[str]:
    return frozenset(text.replace("\n", " ").split())


DETERMINERS = _set("a an the this that these those his her its their my your our any some")
NUMBERS = _set("one two three four five six seven eight nine ten zero")
LEADS = _set("is are was were does do did has have had can could will would should")
LEADING = _set("other many much only both all each every another same")
ADJECTIVES = _set(
    """red green blue yellow white black brown orange purple pink gray grey silver gold golden dark light bright big
    small large little tall short long tiny huge old young new wooden metal plastic main first second third last left
    right upper lower top bottom front back whole open closed empty full wet dry"""
)
STOPS = _set(
    """am be been being and or but nor if so than then as of in on at to from for with without by into onto over under
    above below near next behind beside between among across through during about against around there here it they he
    she we you i who whom whose what which when where why how not no yes image picture photo photograph scene
    color colour kind type sort name number side part brand shape size time day way there's what's visible shown
    seen present contact wearing holding please describe provide give tell explain answer question shortly briefly
    detail details following"""
)
COMPOUNDS = frozenset(
    pair.replace("_", " ")
    for pair in _set(
        """traffic_light fire_hydrant stop_sign parking_meter sports_ball baseball_bat baseball_glove tennis_racket
        wine_glass hot_dog potted_plant dining_table cell_phone mobile_phone teddy_bear hair_drier hair_dryer tv_monitor
        polar_bear ice_cream street_sign tennis_ball soccer_ball license_plate swimming_pool christmas_tree coffee_table
        street_light book_cover washing_machine remote_control palm_tree cutting_board motor_bike"""
    )
)
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
THERE = re.compile(
    r"^(?:is|are|was|were) there (?P<chunk>.+?)(?: (?:visible|present|shown|seen))?(?: (?:in|on|at|within) .*)?\?*$",
    re.I,
)
CONTACT = re.compile(r"\bbetween (?:the |an? )?(?P<chunk>.+?) and\b", re.I)


def words_of(text: str) -> list[str]:
    """Lower-case words without digits and marks."""
    return [word.lower() for word in WORD.findall(text)]


def stem(word: str) -> str:
    """The word without a plural's ending; for comparing, not for showing."""
    for ending, instead in (("ies", "y"), ("ves", "f"), ("ses", "s"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def nouns(question: str, response: str) -> list[str]:
    """Candidates for the key object, the likeliest first; of the answer only where the question has none."""
    found = list(dict.fromkeys(_of_question(question)))
    return found or list(dict.fromkeys(_after_determiners(words_of(response), compact=False)))


def _of_question(question: str) -> Iterator[str]:
    text = question.strip()
    match = THERE.match(text)
    contact = CONTACT.search(text)
    if contact:
        yield from _chunk(words_of(contact["chunk"]), compact=False)
    elif match:
        yield from _chunk(words_of(match["chunk"]), compact=False)
    words = words_of(text)
    # "Is the sky sunny?": what follows the noun is no part of it.
    yield from _after_determiners(words, compact=bool(words) and words[0] in LEADS)
    if words[:2] == ["how", "many"]:
        yield from _chunk(words[2:], compact=False)
    if words[:1] in (["what"], ["which"]):
        yield from _chunk(words[1:], compact=True)
    content = [word for word in words if _is_content(word)]
    yield from content[-1:]


def _after_determiners(words: list[str], *, compact: bool) -> Iterator[str]:
    for place, word in enumerate(words):
        if word in DETERMINERS:
            yield from _chunk(words[place + 1 :], compact=compact)


def _chunk(words: list[str], *, compact: bool) -> Iterator[str]:
    """The noun that begins here, after articles, numbers and adjectives: one word or compound, or all up to a stop."""
    start = 0
    while start < len(words) and words[start] in DETERMINERS | NUMBERS | ADJECTIVES | LEADING:
        start += 1
    rest = words[start:]
    if not rest or not _is_content(rest[0]):
        return
    if " ".join(rest[:2]) in COMPOUNDS:
        yield " ".join(rest[:2])
        return
    end = 1
    while not compact and end < min(3, len(rest)) and _is_content(rest[end]) and not rest[end].endswith(("ing", "ed")):
        end += 1
    yield " ".join(rest[:end])


def _is_content(word: str) -> bool:
    return word not in STOPS and word not in DETERMINERS and word not in LEADS and word not in LEADING and len(word) > 1


class RuleFinder:
    """The likeliest noun of each pair by form alone."""

    identity = "rule"

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """A keyword for each (question, response); empty where there is none."""
        return [next(iter(nouns(question, response)), "") for question, response in pairs]
