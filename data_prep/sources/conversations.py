"""ShareGPT4V and LLaVA: [{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}]."""

from __future__ import annotations

from collections.abc import Iterator

from csp_jax.records import Item
from data_prep.config import ConversationsConfig
from data_prep.sources.base import AnyRow, FileSource, json_rows, text
from data_prep.unit import BadRow, ImageFile, Row

MARK = "<image>"


class Conversations(FileSource):
    """Every turn of a conversation is a question; its answer was written by a model, so nothing says it is right."""

    dataset = "conversations"

    def __init__(self, config: ConversationsConfig):
        super().__init__(config.root, config.file, "file", config.images)
        self.config = config

    def rows(self) -> Iterator[AnyRow]:
        for number, (where, row) in enumerate(json_rows(self._file)):
            try:
                if isinstance(row, Exception):
                    raise row
                name = text(row, "image")
                file = ImageFile(self._images / name)
                said = [(text(turn, "from"), text(turn, "value")) for turn in row["conversations"]]
                pairs = list(zip(said[::2], said[1::2], strict=True))
            except (KeyError, TypeError, ValueError) as error:
                yield BadRow(where, "bad_row", repr(error))
                continue
            for turn, (question, answer) in enumerate(pairs):
                identifier = f"{self.dataset}-{number:07d}-{turn}"
                yield self._row(f"{where}:{turn}", identifier, f"{self.dataset}-{name}", file, question, answer)

    def _row(
        self,
        where: str,
        identifier: str,
        picture: str,
        file: ImageFile,
        question: tuple[str, str],
        answer: tuple[str, str],
    ) -> AnyRow:
        if (question[0], answer[0]) != ("human", "gpt"):
            return BadRow(where, "bad_row", f"{question[0]} and {answer[0]} speak, not human and gpt", identifier)
        if not answer[1].strip():
            return BadRow(where, "no_answer", "", identifier)
        asked = question[1].replace(MARK, "").strip()
        item = Item(id=identifier, question=asked, response=answer[1], coefficient_dataset=self.config.coefficients)
        return Row(where, picture, file, item)
