"""A folder of pictures and JSON lines that ask about them; every field of an item may be given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from csp_jax.records import Item
from data_prep.config import FolderConfig
from data_prep.masks import MaskFile
from data_prep.sources.base import AnyRow, FileSource, checked, json_rows, text
from data_prep.unit import BadRow, ImageFile, Region, Row

TEXTS = ("response", "keyword", "truth", "category", "coefficient_dataset", "rejected")
LISTS = ("candidates", "subsets")
KNOWN = {"id", "image", "image_id", "question", "answer", "right", "regions", *TEXTS, *LISTS}


class Folder(FileSource):
    """One line a question: `image` and `question`, and what is known beside them.

    `answer` is the true answer and also the response unless that is given. `regions` is a list of
    {"box": [x0, y0, x1, y1], "mask": "mask.png", "keyword": ...}; mask and keyword may be left out.
    """

    dataset = "folder"

    def __init__(self, config: FolderConfig):
        super().__init__(config.root, config.file, "file")

    def rows(self) -> Iterator[AnyRow]:
        for number, (where, row) in enumerate(json_rows(self._file)):
            yield checked(where, row, partial(self._row, where, f"{self.dataset}-{number:07d}"))

    def _row(self, where: str, otherwise: str, row: dict[str, Any]) -> AnyRow:
        unknown = sorted(set(row) - KNOWN)
        if unknown:
            return BadRow(where, "bad_row", f"the field {unknown[0]!r} is not known", otherwise)
        image = text(row, "image")
        values: dict[str, Any] = {name: text(row, name) for name in TEXTS if name in row}
        values |= {name: tuple(str(entry) for entry in row[name]) for name in LISTS if name in row}
        if "answer" in row:
            values.setdefault("truth", text(row, "answer"))
            values.setdefault("response", values["truth"])
        if "right" in row:
            values["right"] = int(row["right"])
        elif values.get("truth"):
            values["right"] = int(values.get("response", "") == values["truth"])
        if values.get("right", -1) not in (-1, 0, 1):
            return BadRow(where, "bad_row", f"right is {values['right']}, not 1, 0 or -1", otherwise)
        regions = tuple(self._region(entry, values.get("keyword", "")) for entry in row.get("regions", ()))
        identifier = str(row.get("id", otherwise))
        item = Item(id=identifier, question=text(row, "question"), regions=tuple(range(len(regions))), **values)
        picture = str(row.get("image_id", image))
        return Row(where, f"{self.dataset}-{picture}", ImageFile(self._root / image), item, regions)

    def _region(self, entry: dict[str, Any], keyword: str) -> Region:
        x0, y0, x1, y1 = (float(edge) for edge in entry["box"])
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"the box {entry['box']} is empty")
        mask = MaskFile(self._root / entry["mask"]) if "mask" in entry else None
        return Region(entry.get("keyword", keyword), (x0, y0, x1, y1), mask=mask)
