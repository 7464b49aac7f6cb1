"""TextVQA: {"data": [{"question_id", "question", "image_id", "answers": [ten], ...}]}."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import TextVqaConfig
from data_prep.sources.base import AnyRow, FileSource, checked, read_json, text
from data_prep.sources.vqa import most_common
from data_prep.unit import BadRow, ImageFile, Row


class TextVqa(FileSource):
    """Questions about text in pictures; the truth is what most of ten people said."""

    dataset = "textvqa"

    def __init__(self, config: TextVqaConfig):
        super().__init__(config.root, config.file, "file", config.images)

    def rows(self) -> Iterator[AnyRow]:
        raw = read_json(self._file)
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), list):
            raise UserError("has no list of data", file=self._file, mend="Use TextVQA_0.5.1_*.json")
        for number, row in enumerate(raw["data"], start=1):
            where = f"{self._file.name}:{number}"
            yield checked(where, row, partial(self._row, where))

    def _row(self, where: str, row: dict[str, Any]) -> AnyRow:
        identifier, picture = f"{self.dataset}-{row['question_id']}", text(row, "image_id")
        if not row.get("answers"):
            return BadRow(where, "no_answer", "this split is published without answers", identifier)
        answer = most_common(row["answers"])
        item = Item(
            id=identifier,
            question=text(row, "question"),
            response=answer,
            truth=answer,
            right=1,
            coefficient_dataset="TextVQA",
        )
        return Row(where, f"{self.dataset}-{picture}", ImageFile(self._images / f"{picture}.jpg"), item)
