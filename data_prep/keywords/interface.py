"""What finds keywords."""

from __future__ import annotations

from typing import Protocol


class KeywordFinder(Protocol):
    """Reads the key object's name out of questions and answers."""

    identity: str  # changes whenever the same pair could get another answer

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """What was found for each (question, response), in its own words; empty where there is nothing."""
        ...
