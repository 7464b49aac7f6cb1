"""From what a model said to a keyword, and whether it holds."""

from __future__ import annotations

import re

from data_prep.keywords.rule import DETERMINERS, STOPS, stem, words_of

LABEL = re.compile(r"^(?:key ?word|key object|object|answer|reply)\s*[:=-]\s*", re.IGNORECASE)
MOST_WORDS = 4
NOTHING = frozenset({"none", "nothing", "n/a", "null", "unknown", "no object"})


def clean_keyword(said: str) -> str:
    """The first line without label, quotes, article and final marks, in lower case; empty if that is no short name."""
    line = next((line for line in said.splitlines() if line.strip()), "").strip()
    line = LABEL.sub("", line).strip(" \t\"'`*_“”‘’.,;:!?()[]<>-").lower()
    first = line.split(",")[0].split(" and ")[0].strip()
    words = first.split()
    while words and words[0] in DETERMINERS:
        words = words[1:]
    keyword = " ".join(words)
    if not words or len(words) > MOST_WORDS or keyword in NOTHING or not words_of(keyword):
        return ""
    return keyword


def occurs(keyword: str, question: str, response: str) -> bool:
    """Do all words of the keyword occur in the question or the answer (plural or not), and does one name a thing?"""
    said = {stem(word) for word in [*words_of(question), *words_of(response)]}
    mine = words_of(keyword)
    return any(word not in STOPS for word in mine) and all(stem(word) in said for word in mine)
