"""`csp-prep keywords`: what a finder makes of a source's questions; no picture is opened, nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csp_jax.config import read_yaml
from csp_jax.text import Prompts
from data_prep.config import PrepConfig
from data_prep.keywords.interface import KeywordFinder
from data_prep.keywords.registry import open_finder
from data_prep.keywords.rule import nouns
from data_prep.keywords.stage import KeywordStage
from data_prep.sources.base import units
from data_prep.sources.registry import open_source
from data_prep.unit import Unit

CACHELESS = {"cache": "", "given": False}  # every question is asked, also one whose keyword the source has


@dataclass(frozen=True)
class Answer:
    """One question, what the finder said about it, the keyword that came of it, and how (or why there is none)."""

    question: str
    response: str
    said: str
    keyword: str
    how: str
    rule: str  # what the rule reads


class Listening:
    """A finder that keeps what it said."""

    def __init__(self, finder: KeywordFinder):
        self.finder, self.identity = finder, finder.identity
        self.said: list[str] = []
        self.seconds = 0.0

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """The finder's answers."""
        start = time.perf_counter()
        said = self.finder(pairs)
        self.seconds += time.perf_counter() - start
        self.said += said
        return said


def survey(config: PrepConfig) -> tuple[dict[str, Any], list[Answer]]:
    """Counts and rate, and an answer for each different (question, response) of the source's first rows."""
    prompts = Prompts.from_mapping(read_yaml(Path(config.prompts))) if config.prompts else Prompts()
    settings = config.keywords.model_copy(update=CACHELESS)
    finder, _ = open_finder(settings, prompts)
    listening = Listening(finder)
    stage = KeywordStage(settings, listening)
    different: dict[tuple[str, str], Unit] = {}
    for unit in units(open_source(config), group=False, limit=config.limit):
        for item in unit.items:
            different.setdefault((item.question, item.response), unit)
    asked = list(different.values())
    finder([next(iter(different), ("", ""))])  # warm: a model computes what all prompts share
    for start in range(0, len(asked), config.batch):
        stage(asked[start : start + config.batch])
    answers = [_answer(*pair, said, unit) for (pair, unit), said in zip(different.items(), listening.said, strict=True)]
    return _counts(answers, listening.seconds), answers


def _answer(question: str, response: str, said: str, unit: Unit) -> Answer:
    keyword = unit.items[0].keyword if unit.items else ""
    how = unit.rejects[0].reason if unit.rejects else next(name for name in unit.counts if unit.counts[name])
    return Answer(question, response, said, keyword, how, next(iter(nouns(question, response)), ""))


def _counts(answers: list[Answer], seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"different questions": len(answers)}
    for how in sorted({answer.how for answer in answers}):
        found[how] = sum(answer.how == how for answer in answers)
    same = sum(answer.how == "keyword_found" and answer.keyword == answer.rule for answer in answers)
    found["keyword_found, the same as the rule's"] = same
    found["questions/s"] = len(answers) / seconds if seconds else 0.0
    return found
