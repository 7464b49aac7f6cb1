"""What every source does: rows in an order that never changes, files named, bad rows told apart."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from data_prep.unit import BadRow, Merged, Reject, Row, Unit

AnyRow = Row | BadRow | Merged
YES_NO = ("yes", "no")
TEXTS = ("id", "question", "response", "truth", "rejected", "keyword", "category", "coefficient_dataset")
LISTS = ("candidates", "subsets")
EDGE = 1 << 20  # bytes hashed at each end of a source's file


class Source(abc.ABC):
    """A data set as a stream of rows. The same files give the same rows in the same order.

    A row that cannot be used becomes a `BadRow`; only what makes the whole source unusable is a UserError.
    """

    dataset: str

    @abc.abstractmethod
    def rows(self) -> Iterator[AnyRow]:
        """Every row of the files, usable or not."""

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the rows, in order; without the pictures."""

    def count(self) -> int:
        """How many rows there are; no picture is read for it."""
        return sum(1 for _ in self.rows())

    def fingerprint(self) -> dict[str, str]:
        """File name -> hash of its size, beginning and end: enough to notice that it was exchanged."""
        found = {}
        for path in self.files():
            size = path.stat().st_size
            digest = hashlib.sha256(str(size).encode())
            with path.open("rb") as file:
                digest.update(file.read(EDGE))
                file.seek(max(0, size - EDGE))
                digest.update(file.read(EDGE))
            found[path.name] = digest.hexdigest()
        return found


class FileSource(Source):
    """A source whose rows lie in one file; `field` is the configuration's field that names it."""

    def __init__(self, root: str, file: str, field: str, images: str = ""):
        self._root = Path(root)
        self._images = self._root / images
        self._file = resolve(self._root, file, field)[0]

    def files(self) -> list[Path]:
        return [self._file]


def units(source: Source, *, group: bool, limit: int = 0) -> Iterator[Unit]:
    """The source's rows as units: one a row, or (with `group`) one a picture, in the order of first appearance.

    A bad row is a unit with a reject and no question. So is one that cannot be written down, or whose id is taken.
    """
    rows = itertools.islice(source.rows(), limit) if limit else source.rows()
    distinct = _distinct(rows)
    clusters: Iterator[list[AnyRow]] = _by_picture(distinct) if group else _one_each(distinct)
    for number, cluster in enumerate(clusters):
        yield _unit(source.dataset, number, cluster, group)


def _distinct(rows: Iterator[AnyRow]) -> Iterator[AnyRow]:
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, Row):
            problem = row_problem(row)
            if problem:
                yield BadRow(row.where, *problem, row.item.id if isinstance(row.item.id, str) else "")
                continue
            if row.item.id in seen:
                yield BadRow(row.where, "duplicate_id", f"{row.item.id} is there already", row.item.id)
                continue
            seen.add(row.item.id)
        yield row


def _one_each(rows: Iterator[AnyRow]) -> Iterator[list[AnyRow]]:
    """Merged rows have no unit of their own: they go with the usable row before them."""
    waiting: list[AnyRow] = []
    for row in rows:
        if waiting and not isinstance(row, Merged):
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def _by_picture(rows: Iterator[AnyRow]) -> Iterator[list[AnyRow]]:
    pictures: dict[object, list[AnyRow]] = {}
    last: object = None
    for place, row in enumerate(rows):
        if isinstance(row, Row):
            last = row.image_id
        elif isinstance(row, BadRow) or last is None:
            last = place
        pictures.setdefault(last, []).append(row)
    yield from pictures.values()


def _unit(dataset: str, number: int, rows: list[AnyRow], group: bool) -> Unit:
    usable = [row for row in rows if isinstance(row, Row)]
    if usable:
        first = usable[0]
        key = f"{dataset}-{first.image_id}" if group else first.item.id
        unit = Unit(number, key, first.image_id, first.image, len(rows))
    else:
        unit = Unit(number, "", f"row {number}", None, len(rows))
    for row in rows:
        if isinstance(row, Merged):
            unit.merged += 1
        elif isinstance(row, BadRow):
            unit.rejects.append(Reject(row.where, row.id, "source", row.reason, row.detail))
        else:
            _add(unit, row)
    return unit


def _add(unit: Unit, row: Row) -> None:
    """One question into a unit; regions that the unit has already are not added again."""
    places = []
    for region in row.regions:
        if region not in unit.regions:
            unit.regions.append(region)
        places.append(unit.regions.index(region))
    item = row.item
    if item.regions:
        item = dataclasses.replace(item, regions=tuple(dict.fromkeys(places[index] for index in item.regions)))
    unit.where[item.id] = row.where
    unit.items.append(item)


def row_problem(row: Row) -> tuple[str, str] | None:
    """Why a row cannot be written down: (reason, detail), or None."""
    item = row.item
    texts = [("image_id", row.image_id), *((name, getattr(item, name)) for name in TEXTS)]
    texts += [(name, value) for name in LISTS for value in getattr(item, name)]
    texts += [("keyword", region.keyword) for region in row.regions]
    for name, value in texts:
        if not isinstance(value, str):
            return "bad_row", f"{name} is {type(value).__name__}, not text"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return "bad_unicode", f"{name}: {error.reason} at {error.start}"
        if "\x00" in value or "\ufffd" in value:
            return "bad_unicode", f"{name}: a character that stands for one that was lost"
    return None if item.question.strip() else ("empty_question", "")


def resolve(root: Path, patterns: tuple[str, ...] | str, field: str) -> list[Path]:
    """The files that patterns name below `root`, sorted for each pattern; UserError when one names none."""
    if not root.is_dir():
        raise UserError("no such folder", field="source.root", value=str(root), mend="Give the data set's folder")
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        these = sorted(root.glob(pattern))
        if not these:
            raise UserError(
                f"no such file below {root}", field=f"source.{field}", value=pattern, mend="Check the folder's layout"
            )
        found += [path for path in these if path not in found]
    return found


def read_json(path: Path) -> Any:
    """A JSON file; UserError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON ({error})", file=path, mend="Download the file again") from None


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, object) of JSON lines or (not in a .jsonl file) of an array; a line that is no JSON gives its error."""
    with path.open("rb") as file:
        start = file.read(256).lstrip()[:1]
    if start == b"[" and path.suffix != ".jsonl":
        for number, row in enumerate(read_json(path), start=1):
            yield f"{path.name}:{number}", row
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{path.name}:{number}", json.loads(line)
                except ValueError as error:
                    yield f"{path.name}:{number}", error


def by_id(rows: list[Any], field: str) -> dict[Any, dict[str, Any]]:
    """Objects by a field of theirs; what has no usable one is left out."""
    return {row[field]: row for row in rows if isinstance(row, dict) and isinstance(row.get(field), int | str)}


def checked(where: str, row: Any, make: Callable[[dict[str, Any]], AnyRow]) -> AnyRow:
    """`make(row)`, or the bad row that it is: not an object, or a field that is missing or of another kind."""
    if isinstance(row, Exception):
        return BadRow(where, "bad_row", f"not JSON: {row}")
    if not isinstance(row, dict):
        return BadRow(where, "bad_row", f"an object is expected, not {type(row).__name__}")
    try:
        return make(row)
    except KeyError as error:
        return BadRow(where, "bad_row", f"the field {error} is missing")
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        return BadRow(where, "bad_row", str(error))


def text(row: dict[str, Any], name: str) -> str:
    """A text field; KeyError or TypeError when it is missing or no text."""
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return value


def yes_no_fields(answer: str) -> dict[str, Any]:
    """The item's fields of a question whose true answer is yes or no."""
    if answer not in YES_NO:
        raise ValueError(f"the answer is {answer!r}, not yes or no")
    other = YES_NO[1 - YES_NO.index(answer)]
    return {"response": answer, "truth": answer, "candidates": YES_NO, "right": 1, "rejected": other}
