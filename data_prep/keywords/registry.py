"""Which finder answers to which `keywords.model.name`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csp_jax.text import Prompts
from data_prep.config import KeywordsConfig, ModelKeywords, ServerKeywords, SpacyKeywords
from data_prep.keywords.cache import Cached
from data_prep.keywords.interface import KeywordFinder
from data_prep.keywords.rule import RuleFinder


def open_finder(config: KeywordsConfig, prompts: Prompts) -> tuple[KeywordFinder, dict[str, Any]]:
    """The finder, behind its cache where asking is dear, and what its weights are."""
    model = config.model
    finder: Any
    if isinstance(model, SpacyKeywords):
        from data_prep.keywords.spacy_chunks import SpacyFinder

        finder = SpacyFinder(model)
        return finder, {"keywords": finder.weights}
    if isinstance(model, ModelKeywords):
        from data_prep.keywords.language_model import LanguageModel

        finder = LanguageModel(model, prompts)
    elif isinstance(model, ServerKeywords):
        from data_prep.keywords.server import Server

        finder = Server(model, prompts)
    else:
        return RuleFinder(), {}
    weights = {"keywords": finder.weights}
    return (Cached(finder, Path(config.cache)) if config.cache else finder), weights
