"""OCR-VQA: {id: {"imageURL", "questions": [...], "answers": [...], "split"}}, one book cover each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import OcrVqaConfig
from data_prep.sources.base import AnyRow, FileSource, read_json, yes_no_fields
from data_prep.unit import BadRow, ImageFile, Row


class OcrVqa(FileSource):
    """Several questions about each book cover; the file is named by the id and the suffix of its URL."""

    dataset = "ocrvqa"

    def __init__(self, config: OcrVqaConfig):
        super().__init__(config.root, config.file, "file", config.images)
        self.config = config

    def rows(self) -> Iterator[AnyRow]:
        raw = read_json(self._file)
        if not isinstance(raw, dict):
            raise UserError("is no object of books", file=self._file, mend="Use OCR-VQA's dataset.json")
        for book, row in raw.items():
            where = f"{self._file.name}:{book}"
            try:
                if row["split"] not in self.config.splits:
                    continue
                pairs = list(zip(row["questions"], row["answers"], strict=True))
                file = ImageFile(self._images / f"{book}{PurePosixPath(row['imageURL']).suffix or '.jpg'}")
            except (KeyError, TypeError, ValueError) as error:
                yield BadRow(where, "bad_row", repr(error))
                continue
            for number, (question, answer) in enumerate(pairs):
                yield self._row(f"{where}:{number}", f"{self.dataset}-{book}", file, number, question, answer)

    def _row(self, where: str, book: str, file: ImageFile, number: int, question: Any, answer: Any) -> AnyRow:
        identifier = f"{book}-{number}"
        if not (isinstance(question, str) and isinstance(answer, str)):
            return BadRow(where, "bad_row", "question and answer must be text", identifier)
        if not answer.strip():
            return BadRow(where, "no_answer", "", identifier)
        lower = answer.strip().lower()
        truth: dict[str, Any] = {"response": answer, "truth": answer, "right": 1}
        fields = yes_no_fields(lower) if lower in ("yes", "no") else truth
        return Row(where, book, file, Item(id=identifier, question=question, coefficient_dataset="OCR-VQA", **fields))
