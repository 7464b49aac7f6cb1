"""AMBER: queries {"id", "image", "query"} and annotations {"id", "type", "truth"}, joined by id."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import AmberConfig
from data_prep.sources.base import AnyRow, Source, by_id, checked, json_rows, read_json, resolve, text, yes_no_fields
from data_prep.unit import BadRow, ImageFile, Row

# AMBER's types -> (subset, category). The relation questions whose truth is no carry a type of their own.
TYPES = {
    "discriminative-hallucination": ("existence", "existence"),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", "relation"),
    "relation": ("relation", "relation"),
}


class Amber(Source):
    """Yes/no questions about existence, attributes and relations."""

    dataset = "amber"

    def __init__(self, config: AmberConfig):
        root = Path(config.root)
        self._images = root / config.images
        self._queries = resolve(root, config.queries, "queries")
        self._annotations = resolve(root, config.annotations, "annotations")[0]

    def files(self) -> list[Path]:
        return [*self._queries, self._annotations]

    def rows(self) -> Iterator[AnyRow]:
        raw = read_json(self._annotations)
        if not isinstance(raw, list):
            raise UserError("is no list of annotations", file=self._annotations, mend="Use AMBER's annotations.json")
        annotations = by_id(raw, "id")
        for path in self._queries:
            for where, row in json_rows(path):
                yield checked(where, row, partial(self._row, where, annotations))

    def _row(self, where: str, annotations: dict[int, dict[str, Any]], row: dict[str, Any]) -> AnyRow:
        identifier, image = f"{self.dataset}-{row['id']}", text(row, "image")
        annotation = annotations.get(row["id"])
        if annotation is None:
            return BadRow(where, "bad_row", "no annotation has this id", identifier)
        kind = text(annotation, "type")
        if kind == "generative":
            return BadRow(where, "no_answer", "a generative query has no answer to ask about", identifier)
        if kind not in TYPES:
            return BadRow(where, "bad_row", f"the type {kind!r} is not known", identifier)
        subset, category = TYPES[kind]
        item = Item(
            id=identifier,
            question=text(row, "query"),
            subsets=(subset,),
            category=category,
            **yes_no_fields(text(annotation, "truth").strip().lower()),
        )
        return Row(where, f"{self.dataset}-{image}", ImageFile(self._images / image), item)
