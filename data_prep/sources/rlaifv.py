"""RLAIF-V: parquet rows of ds_name, image{path, bytes}, question, chosen, rejected, origin_dataset, ..., image_path."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import RlaifvConfig
from data_prep.sources.base import AnyRow, Source, checked, resolve, text
from data_prep.unit import BadRow, Row

NEEDED = {"image", "question", "chosen", "rejected"}
USED = ("question", "chosen", "rejected", "origin_dataset", "image_path")


class ParquetPictures:
    """The picture column of parquet files, read one row group at a time."""

    def __init__(self) -> None:
        self._group: tuple[Path, int] | None = None
        self._pictures: list[Any] = []
        self._lock = threading.Lock()

    def read(self, path: Path, group: int, row: int) -> bytes:
        """One encoded picture; OSError when the row holds none."""
        import pyarrow.parquet

        with self._lock:
            if self._group != (path, group):
                table = pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=["image"])
                self._pictures, self._group = table.column("image").to_pylist(), (path, group)
            picture = self._pictures[row]
        data = picture.get("bytes") if isinstance(picture, dict) else None
        if not data:
            raise FileNotFoundError("the row holds no picture")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._group, self._pictures, self._lock = None, [], threading.Lock()


@dataclass(frozen=True)
class ParquetImage:
    """One picture of a parquet file."""

    pictures: ParquetPictures
    path: Path
    group: int
    row: int

    def read(self) -> bytes:
        """The encoded picture."""
        return self.pictures.read(self.path, self.group, self.row)


class Rlaifv(Source):
    """Preference pairs. `chosen` is preferred, not verified; with `trust` it counts as right all the same."""

    dataset = "rlaifv"

    def __init__(self, config: RlaifvConfig):
        self.config = config
        self._files = resolve(Path(config.root), config.files, "files")

    def files(self) -> list[Path]:
        return self._files

    def count(self) -> int:
        return sum(_open(path).metadata.num_rows for path in self._files)

    def rows(self) -> Iterator[AnyRow]:
        number = 0
        pictures = ParquetPictures()
        for path in self._files:
            file = _open(path)
            columns = [name for name in USED if name in file.schema_arrow.names]
            columns += ["image.path"] if "image_path" not in columns else []
            for group in range(file.num_row_groups):
                for place, row in enumerate(_read(file, path, group, columns)):
                    image = ParquetImage(pictures, path, group, place)
                    yield checked(
                        f"{path.name}:{number}", row, partial(self._row, f"{path.name}:{number}", number, image)
                    )
                    number += 1

    def _row(self, where: str, number: int, image: ParquetImage, row: dict[str, Any]) -> AnyRow:
        identifier = f"{self.dataset}-{number:07d}"
        chosen = text(row, "chosen")
        if not chosen.strip():
            return BadRow(where, "no_answer", "chosen is empty", identifier)
        item = Item(
            id=identifier,
            question=text(row, "question"),
            response=chosen,
            rejected=text(row, "rejected"),
            right=1 if self.config.trust else -1,
            coefficient_dataset=row.get("origin_dataset") or "",
        )
        picture = row.get("image_path") or (row.get("image") or {}).get("path") or identifier
        return Row(where, f"{self.dataset}-{picture}", image, item)


def _open(path: Path) -> Any:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    missing = NEEDED - set(file.schema_arrow.names)
    if missing:
        problem = f"the columns {', '.join(sorted(missing))} are missing"
        raise UserError(problem, file=path, mend="RLAIF-V's columns are image, question, chosen and rejected")
    return file


def _read(file: Any, path: Path, group: int, columns: list[str]) -> list[dict[str, Any]]:
    try:
        return file.read_row_group(group, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot be read as parquet ({error})", file=path, mend="Download the file again")
