"""Noun chunks by spaCy: the first one of the question whose head is a thing to be seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from data_prep.config import SpacyKeywords
from data_prep.hashes import hash_of
from data_prep.keywords.rule import DETERMINERS, LEADING, NUMBERS, STOPS


def open_model(name: str) -> Any:
    """A spaCy pipeline: an installed model, a folder, or a package that holds one; UserError when it is none."""
    mend = "Install the `prep` extra, or set keywords.model={name: rule}"
    try:
        import spacy
    except ImportError:
        raise UserError("spaCy is not installed", field="keywords.model", value="spacy", mend=mend) from None
    places: list[str | Path] = [name]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        package = Path(next(iter(spec.submodule_search_locations)))
        places += [path.parent for path in sorted(package.rglob("config.cfg"))]
    for place in places:
        try:
            return spacy.load(place, exclude=["ner"])
        except (OSError, ValueError, ImportError):
            continue
    raise UserError("spaCy finds no such model", field="keywords.model.model", value=name, mend=mend)


class SpacyFinder:
    """The noun of the question's first chunk that names a thing; of the answer's where the question has none."""

    def __init__(self, config: SpacyKeywords):
        self._nlp = open_model(config.model)
        meta = self._nlp.meta
        self.identity = hash_of(["spacy", meta["name"], meta["version"]])
        self.weights = f"{meta['lang']}_{meta['name']} {meta['version']}"

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """A keyword for each (question, response); empty where there is none."""
        documents = list(self._nlp.pipe([text for pair in pairs for text in pair]))
        return [self._first(q) or self._first(r) for q, r in zip(documents[::2], documents[1::2])]

    def _first(self, document: Any) -> str:
        for chunk in document.noun_chunks:
            head = chunk.root
            if head.pos_ not in ("NOUN", "PROPN") or head.lower_ in STOPS:
                continue
            own = [token for token in chunk if token.dep_ in ("compound", "nmod") or token.i == head.i]
            words = [token.lower_ for token in own if token.lower_ not in DETERMINERS | NUMBERS | LEADING | STOPS]
            if words:
                return " ".join(words)
        return ""
