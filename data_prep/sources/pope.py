"""POPE: {"question_id", "image", "text", "label"} as JSON lines or an array, one file for each kind of negative."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from csp_jax.records import Item
from data_prep.config import PopeConfig
from data_prep.sources.base import AnyRow, Source, checked, json_rows, resolve, text, yes_no_fields
from data_prep.unit import ImageFile, Merged, Row


class Pope(Source):
    """Existence questions. A question that several files ask about one picture becomes one item of several subsets."""

    dataset = "pope"

    def __init__(self, config: PopeConfig):
        root = Path(config.root)
        self._images = root / config.images
        self._files = resolve(root, config.files, "files")

    def files(self) -> list[Path]:
        return self._files

    def rows(self) -> Iterator[AnyRow]:
        found: dict[object, list[AnyRow]] = {}
        for path in self._files:
            subset = path.stem.rpartition("_")[2]
            for where, raw in json_rows(path):
                row = checked(where, raw, partial(self._row, where, subset))
                same = (row.image_id, row.item.question, row.item.truth) if isinstance(row, Row) else where
                cluster = found.setdefault(same, [row])
                first = cluster[0]
                if isinstance(first, Row) and first is not row:
                    subsets = tuple(dict.fromkeys((*first.item.subsets, subset)))
                    cluster[0] = dataclasses.replace(first, item=dataclasses.replace(first.item, subsets=subsets))
                    cluster.append(Merged(where))
        for cluster in found.values():
            yield from cluster

    def _row(self, where: str, subset: str, row: dict[str, Any]) -> AnyRow:
        image, question = text(row, "image"), text(row, "text")
        item = Item(
            id=f"{self.dataset}-{subset}-{row['question_id']}",
            question=question,
            subsets=(subset,),
            category="existence",
            **yes_no_fields(text(row, "label").strip().lower()),
        )
        return Row(where, f"{self.dataset}-{image}", ImageFile(self._images / image), item)
