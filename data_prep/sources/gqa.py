"""GQA: {question id: {"imageId", "question", "answer", ...}}, and scene graphs with boxes of the things asked about."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import GqaConfig
from data_prep.sources.base import YES_NO, AnyRow, FileSource, checked, read_json, resolve, text, yes_no_fields
from data_prep.unit import ImageFile, Region, Row


class Gqa(FileSource):
    """Compositional questions. With scene graphs, the objects that a question names come with their boxes."""

    dataset = "gqa"

    def __init__(self, config: GqaConfig):
        super().__init__(config.root, config.questions, "questions", config.images)
        self._graphs = resolve(self._root, config.scene_graphs, "scene_graphs")[0] if config.scene_graphs else None

    def files(self) -> list[Path]:
        return [*super().files(), *([self._graphs] if self._graphs else [])]

    def rows(self) -> Iterator[AnyRow]:
        questions = read_json(self._file)
        graphs = read_json(self._graphs) if self._graphs else {}
        if not isinstance(questions, dict) or not isinstance(graphs, dict):
            raise UserError("is no object of questions", file=self._file, mend="Use GQA's own files")
        for number, row in questions.items():
            where = f"{self._file.name}:{number}"
            yield checked(where, row, partial(self._row, where, number, graphs))

    def _row(self, where: str, number: str, graphs: dict[str, Any], row: dict[str, Any]) -> AnyRow:
        picture, answer = text(row, "imageId"), text(row, "answer").strip().lower()
        regions = self._regions(row, graphs.get(picture, {}).get("objects", {}))
        truth: dict[str, Any] = {"response": answer, "truth": answer, "right": 1}
        item = Item(
            id=f"{self.dataset}-{number}",
            question=text(row, "question"),
            keyword=regions[0].keyword if regions else "",
            regions=tuple(range(len(regions))),
            category=row.get("types", {}).get("structural", ""),
            coefficient_dataset="GQA",
            **(yes_no_fields(answer) if answer in YES_NO else truth),
        )
        return Row(where, f"{self.dataset}-{picture}", ImageFile(self._images / f"{picture}.jpg"), item, regions)

    def _regions(self, row: dict[str, Any], objects: dict[str, Any]) -> tuple[Region, ...]:
        """The boxes of the first object that the question's words point at, and of those of its name."""
        pointed = list(row.get("annotations", {}).get("question", {}).values())
        known = [objects[number] for number in pointed if number in objects]
        same = [thing for thing in known if thing["name"] == known[0]["name"]]
        return tuple(
            Region(thing["name"], (thing["x"], thing["y"], thing["x"] + thing["w"], thing["y"] + thing["h"]))
            for thing in same
        )
