"""Class names from captions: the head noun of "An electric guitar." is "guitar". English rules, no model."""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
# A caption that opens with one of these shows several things, or is a sentence rather than a name.
REFUSED_OPENINGS = frozenset({
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some", "several", "many",
    "couple", "pair", "few", "group", "bunch", "set", "half", "this", "that", "these", "those", "it",
    "its", "he", "she", "they", "there", "here", "i", "we", "you", "my", "your", "his", "her", "no",
    "not", "do", "did",
})  # fmt: skip
# The name ends before these.
BREAKS = frozenset({
    "of", "with", "without", "from", "in", "on", "at", "by", "for", "to", "and", "or", "as", "near",
    "under", "over", "before", "after", "during", "until", "since", "that", "which", "who", "whose",
    "where", "when", "while", "is", "are", "was", "were", "be", "has", "have", "had", "can", "could",
    "may", "might", "will", "would", "used", "called", "known", "made", "seen", "worn", "wearing",
    "holding", "sitting", "standing", "lying", "stands", "sits", "lies",
})  # fmt: skip
LONGEST_NAME = 4  # words; longer ones are sentences
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet",
    "tooth": "teeth", "ox": "oxen", "person": "people", "leaf": "leaves", "knife": "knives", "wolf": "wolves",
    "calf": "calves", "loaf": "loaves", "shelf": "shelves", "wife": "wives", "half": "halves", "die": "dice",
    "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "human": "humans",
}  # fmt: skip
UNCHANGED = frozenset({"sheep", "deer", "bison", "moose", "shrimp", "salmon", "trout", "swine", "aircraft", "squid"})


def head_noun(caption: str) -> str | None:
    """The noun that a caption names, in lower case, or None where it names none or several things."""
    phrase = re.split(r"[.,;:!?()—–]|\s-\s", caption.strip().lower(), maxsplit=1)[0]
    words = re.findall(r"[a-z]+(?:['’][a-z]+)?|\d+", phrase.replace("-", " "))
    if words and words[0] in ARTICLES:
        words = words[1:]
    if not words or words[0] in REFUSED_OPENINGS:
        return None
    name = words[: next((place for place, word in enumerate(words) if word in BREAKS), len(words))]
    while name and len(name[-1]) > 5 and name[-1].endswith("ed"):  # "a tree covered with snow"
        name = name[:-1]
    if not 0 < len(name) <= LONGEST_NAME or not name[-1].isalpha() or len(name[-1]) < 2:
        return None
    return name[-1]


def plural_of(noun: str) -> str:
    """The plural of an English noun; of several words the last one changes."""
    first, _, last = noun.rpartition(" ")
    if first:
        return f"{first} {plural_of(last)}"
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun in UNCHANGED or noun.endswith("fish"):
        return noun
    if noun.endswith("man"):
        return noun[:-2] + "en"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"
