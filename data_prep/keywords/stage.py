"""The stage: keywords given by the source, or found, cleaned and checked."""

from __future__ import annotations

from csp_jax.records import Item
from data_prep.config import KeywordsConfig
from data_prep.keywords.clean import clean_keyword, occurs
from data_prep.keywords.interface import KeywordFinder
from data_prep.keywords.rule import nouns
from data_prep.unit import Unit


class KeywordStage:
    """Gives every question its keyword; one without is rejected."""

    name = "keyword"

    def __init__(self, config: KeywordsConfig, finder: KeywordFinder):
        self.config, self.finder = config, finder

    def __call__(self, batch: list[Unit]) -> None:
        asked: list[tuple[Unit, Item]] = []
        for unit in batch:
            for item in unit.items:
                if self.config.given and item.keyword:
                    unit.counts["keyword_given"] += 1
                else:
                    asked.append((unit, item))
        said = self.finder([(item.question, item.response) for _, item in asked]) if asked else []
        for (unit, item), text in zip(asked, said, strict=True):
            self._settle(unit, item, text)

    def _settle(self, unit: Unit, item: Item, text: str) -> None:
        keyword = clean_keyword(text)
        if keyword and (not self.config.check or occurs(keyword, item.question, item.response)):
            unit.counts["keyword_found"] += 1
            unit.replace(item, keyword=keyword)
            return
        problem = "keyword_not_in_text" if keyword else "no_keyword"
        other = next(iter(nouns(item.question, item.response)), "") if self.config.otherwise == "rule" else ""
        if other:
            unit.counts["keyword_by_rule"] += 1
            unit.replace(item, keyword=other)
        elif self.config.nothing == "keep":
            unit.counts["kept_without_keyword"] += 1
            unit.replace(item, keyword="")
        else:
            unit.reject(item, self.name, problem, text.strip()[:80])
