"""The shard contract: what a record holds, how it lies on disk, and the one writer of data sets.

A data set is a directory that tensorflow-datasets (`builder_from_directory(directory).as_data_source(split)`)
and plain Grain (`ArrayRecordDataSource` + `decode`) both read: `dataset_info.json`, `features.json`, shards
`NAME-SPLIT.array_record-00000-of-0000N`, and beside them `manifest.json` with counts, checksums and
metadata. One record is one `tf.train.Example`. Its nested lists lie as parallel columns (`RECORD_COLUMNS`,
`REGION_COLUMNS`, `ITEM_COLUMNS`); a list inside an item adds a column `<name>_count`. Nothing here needs jax,
torch or tensorflow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from csp_jax.errors import UserError
from csp_jax.manifest import (
    MANIFEST,
    Manifest,
    check_complete,
    check_version,
    load_manifest,
    published_splits,
)
from csp_jax.split_writer import SplitWriter

SCHEMA_VERSION = "1.0.0"


@dataclass(frozen=True, eq=False)
class Region:
    """One key-object region; `box` is x0, y0, x1, y1 in pixels of its image, half-open."""

    keyword: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float = 1.0
    image: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        mine = (self.keyword, self.box, self.score, self.image)
        return mine == (other.keyword, other.box, other.score, other.image) and np.array_equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.keyword, self.box, self.score, self.image))


@dataclass(frozen=True)
class Item:
    """One question about the record's images; `ITEM_COLUMNS` says what each field means."""

    id: str
    question: str
    response: str = ""
    keyword: str = ""
    regions: tuple[int, ...] = ()
    truth: str = ""
    candidates: tuple[str, ...] = ()
    right: int = -1
    subsets: tuple[str, ...] = ()
    category: str = ""
    coefficient_dataset: str = ""
    rejected: str = ""
    confidence: float = -1.0
    perturbed_image: bytes = b""


@dataclass(frozen=True)
class Record:
    """The images of one example, their key-object regions and the questions about them."""

    id: str
    dataset: str
    image_id: str
    images: tuple[bytes, ...]
    regions: tuple[Region, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Column:
    """One column on disk: `kind` is text (UTF-8), bytes, int64 or float32; `ragged` adds `<name>_count`."""

    kind: str
    unit: str
    ragged: bool = False
    width: int = 1


RECORD_COLUMNS = {
    "id": Column("text", "unique in the data set (whoever writes it sees to that)"),
    "dataset": Column("text", "where the record comes from"),
    "image_id": Column("text", "splits and bootstraps go by image"),
    "images": Column("bytes", "encoded PNG/JPEG files"),
}
REGION_COLUMNS = {
    "keyword": Column("text", "the object's name"),
    "box": Column("float32", "x0, y0, x1, y1 in pixels of the image, half-open", width=4),
    "mask": Column("bytes", "little-endian uint32 run lengths, row-major, the first run counts zeros"),
    "score": Column("float32", "detector score in [0, 1]"),
    "image": Column("int64", "index into images"),
}
ITEM_COLUMNS = {
    "id": Column("text", "unique in the data set (whoever writes it sees to that)"),
    "question": Column("text", "the question as asked"),
    "response": Column("text", "the response whose confidence is asked"),
    "keyword": Column("text", "the key object's name, empty: none"),
    "regions": Column("int64", "indices into regions, empty: no object", ragged=True),
    "truth": Column("text", "ground-truth answer, empty: unknown"),
    "candidates": Column("text", "the possible answers, empty: free-form", ragged=True),
    "right": Column("int64", "is the response right: 1, 0, -1 unknown"),
    "subsets": Column("text", "splits of the benchmark this item counts in", ragged=True),
    "category": Column("text", "existence, number, size, contact, ..."),
    "coefficient_dataset": Column("text", "which data set's difficulty coefficients"),
    "rejected": Column("text", "the worse response of a preference pair"),
    "confidence": Column("float32", "label of a materialized set in percent, -1: none"),
    "perturbed_image": Column("bytes", "encoded noised image of a materialized set, empty: none"),
}
_DEFAULTED: dict[type, set[str]] = {
    of: {f.name for f in dataclasses.fields(of) if f.default is not dataclasses.MISSING} for of in (Region, Item)
}
_LIST = {"text": "bytes_list", "bytes": "bytes_list", "int64": "int64_list", "float32": "float_list"}


def encode_mask(mask: np.ndarray) -> np.ndarray:
    """Run lengths uint32[runs] of a bool[height, width] mask, row-major; the first run counts zeros."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        problem = f"a mask is a bool array of two dimensions, not {mask.dtype}{mask.shape}"
        raise UserError(problem, field="mask")
    flat = mask.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = [0, 0] if flat.size and flat[0] else [0]
    return np.diff(np.concatenate([start, changes, [flat.size]])).astype(np.uint32)


def decode_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The bool[height, width] mask of run lengths uint32[runs]; UserError unless they fill it exactly."""
    total = int(np.sum(runs, dtype=np.int64))
    if total != height * width:
        raise UserError(f"the mask's runs cover {total} pixels, the image has {height} x {width}", field="mask")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


@functools.cache
def _example_class() -> Any:
    """The message class of tf.train.Example, built from its field numbers: no tensorflow to import."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    package = "csp_jax"
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package=package, syntax="proto3")

    def add(parent: Any, name: str, number: int, kind: int, of: str | None = None, many: bool = False) -> Any:
        label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
        return parent.field.add(name=name, number=number, type=kind, label=label, type_name=of)

    lists = {"Bytes": kinds.TYPE_BYTES, "Float": kinds.TYPE_FLOAT, "Int64": kinds.TYPE_INT64}
    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(lists.items(), start=1):
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, many=True)
        of = f".{package}.{name}List"
        add(feature, f"{name.lower()}_list", number, kinds.TYPE_MESSAGE, of).oneof_index = 0
    file.message_type.append(feature)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, kinds.TYPE_STRING)
    add(entry, "value", 2, kinds.TYPE_MESSAGE, ".csp_jax.Feature")
    add(features, "feature", 1, kinds.TYPE_MESSAGE, ".csp_jax.Features.FeatureEntry", many=True)
    add(file.message_type.add(name="Example"), "features", 1, kinds.TYPE_MESSAGE, ".csp_jax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("csp_jax.Example"))


def _check(record: Record) -> None:
    """UserError naming the field that breaks the contract."""

    def refuse(problem: str, name: str, value: object) -> NoReturn:
        raise UserError(f"record {record.id!r}: {problem}", field=name, value=value)

    for region in record.regions:
        x0, y0, x1, y1 = region.box
        if not (x0 <= x1 and y0 <= y1):
            refuse("a box is x0, y0, x1, y1 with x0 <= x1 and y0 <= y1", "regions.box", region.box)
        if not 0 <= region.score <= 1:
            refuse("a score lies in [0, 1]", "regions.score", region.score)
        if not 0 <= region.image < len(record.images):
            refuse(f"there are {len(record.images)} images", "regions.image", region.image)
        if region.mask.ndim != 1 or region.mask.dtype != np.uint32:
            refuse("a mask is encoded as uint32 runs (encode_mask)", "regions.mask", region.mask.dtype)
    for item in record.items:
        if item.right not in (-1, 0, 1):
            refuse("right is 1, 0 or -1", "items.right", item.right)
        if not (item.confidence == -1 or 0 <= item.confidence <= 100):
            refuse("a confidence is 0 to 100 percent, or -1", "items.confidence", item.confidence)
        if any(not 0 <= index < len(record.regions) for index in item.regions):
            refuse(f"there are {len(record.regions)} regions", "items.regions", item.regions)


def encode(record: Record) -> bytes:
    """The record as bytes of a tf.train.Example, the same bytes for equal records; floats become float32."""
    _check(record)
    example = _example_class()()
    features = example.features.feature

    def put(name: str, kind: str, values: Sequence[Any]) -> None:
        target = getattr(features[name], _LIST[kind])
        target.SetInParent()  # an empty list still says its kind: readers tell it from a missing column
        try:
            target.value.extend([text.encode() for text in values] if kind == "text" else values)
        except (TypeError, AttributeError, ValueError) as error:
            problem = f"record {record.id!r}: this is not {kind} ({error})"
            raise UserError(problem, field=name.replace("/", ".")) from error

    for name in ("id", "dataset", "image_id"):
        put(name, "text", [getattr(record, name)])
    put("images", "bytes", record.images)
    for name, column in REGION_COLUMNS.items():
        values = [getattr(region, name) for region in record.regions]
        if name == "mask":
            values = [mask.astype("<u4").tobytes() for mask in values]
        elif column.width > 1:
            values = [number for row in values for number in row]
        put(f"regions/{name}", column.kind, values)
    for name, column in ITEM_COLUMNS.items():
        values = [getattr(item, name) for item in record.items]
        if column.ragged:
            put(f"items/{name}_count", "int64", [len(value) for value in values])
            values = [entry for value in values for entry in value]
        put(f"items/{name}", column.kind, values)
    return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
    """The record of `encode`'s bytes; a column that an older minor version lacks gets its field's default.

    UserError when the bytes are no such record.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(data).features.feature
        name, dataset, image_id = (_column(features, n, "text")[0] for n in ("id", "dataset", "image_id"))
        images = tuple(_column(features, "images", "bytes"))
        regions = _objects(features, "regions", Region, REGION_COLUMNS)
        return Record(name, dataset, image_id, images, regions, _objects(features, "items", Item, ITEM_COLUMNS))
    except (DecodeError, ValueError, IndexError) as error:
        problem = f"these {len(data)} bytes are not a record ({error})"
        raise UserError(problem, mend="Write the data set again") from error


def _column(features: Any, name: str, kind: str) -> list[Any]:
    values = getattr(features[name], _LIST[kind]).value
    return [value.decode() for value in values] if kind == "text" else list(values)


def _objects(features: Any, group: str, of: Any, table: dict[str, Column]) -> tuple[Any, ...]:
    """The regions or items of a record: its parallel columns, turned into rows."""
    columns: dict[str, Sequence[Any]] = {}
    count = None
    for name, column in table.items():
        values: Sequence[Any] = _column(features, f"{group}/{name}", column.kind)
        if column.ragged:
            values = _chunks(values, features[f"{group}/{name}_count"].int64_list.value)
        elif column.width > 1:
            values = list(zip(*(values[i :: column.width] for i in range(column.width)), strict=True))
        elif name == "mask":
            values = [np.frombuffer(runs, dtype="<u4") for runs in values]
        count = len(values) if count is None else count
        if len(values) == count:
            columns[name] = values
        elif values or name not in _DEFAULTED[of]:
            raise ValueError(f"{len(values)} values in {group}/{name}, {count} in the first column")
    if len(columns) == len(table):
        return tuple(map(of, *columns.values()))
    return tuple(of(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))


def _chunks(values: Sequence[Any], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    chunks, start = [], 0
    for count in counts:
        chunks.append(tuple(values[start : start + count]))
        start += count
    if start != len(values):
        raise ValueError(f"{len(values)} values for counts that add up to {start}")
    return chunks


def features_text() -> str:
    """The text of features.json: the three column tables as tensorflow-datasets writes them down."""
    module = "tensorflow_datasets.core.features"

    def leaf(column: Column) -> dict[str, Any]:
        if column.kind in ("text", "bytes"):  # tensorflow-datasets hands both out as bytes
            return {"pythonClassName": f"{module}.text_feature.Text", "text": {}}
        shape = {"dimensions": ["-1", str(column.width)]} if column.width > 1 else {}
        tensor = {"dtype": column.kind, "encoding": "none", "shape": shape}
        return {"pythonClassName": f"{module}.tensor_feature.Tensor", "tensor": tensor}

    def sequence(column: Column) -> dict[str, Any]:
        if column.width > 1:
            return leaf(column)
        name = f"{module}.sequence_feature.Sequence"
        return {"pythonClassName": name, "sequence": {"feature": leaf(column), "length": "-1"}}

    def dictionary(features: dict[str, Any]) -> dict[str, Any]:
        name = f"{module}.features_dict.FeaturesDict"
        return {"pythonClassName": name, "featuresDict": {"features": features}}

    record = {name: leaf(column) for name, column in RECORD_COLUMNS.items() if name != "images"}
    record["images"] = sequence(RECORD_COLUMNS["images"])
    items: dict[str, Any] = {}
    for name, column in ITEM_COLUMNS.items():
        items[name] = sequence(column)
        if column.ragged:
            items[f"{name}_count"] = sequence(Column("int64", "entries of each item"))
    record["regions"] = dictionary({name: sequence(column) for name, column in REGION_COLUMNS.items()})
    record["items"] = dictionary(items)
    return json.dumps(dictionary(record), indent=1, sort_keys=True) + "\n"


def read_manifest(directory: str | Path) -> Manifest:
    """What a data set holds: its finished splits, counts, checksums, schema version, metadata.

    UserError when the directory is no data set, its write was interrupted, or its major version isn't ours.
    """
    directory = Path(directory)
    check_complete(directory)
    manifest = load_manifest(directory / MANIFEST)
    check_version(manifest, SCHEMA_VERSION)
    published = published_splits(directory)
    splits = {name: split for name, split in manifest.splits.items() if name in published}
    return dataclasses.replace(manifest, splits=splits)


class ShardWriter(SplitWriter):
    """Writes the records of one split; the split appears, whole, when the `with` block ends well.

    `SplitWriter` has the arguments, how a write is resumed or replaced, and the errors.
    """

    schema_version = SCHEMA_VERSION

    def write(self, record: Record) -> None:
        """Add one record; UserError when it breaks the contract or the disk is full."""
        self.write_bytes(encode(record), items=len(record.items))

    def completed_records(self) -> Iterator[Record]:
        """The records of the completed shards, in the order in which they were written."""
        return map(decode, self.completed_bytes())

    def features_text(self) -> str:
        """The text of features.json."""
        return features_text()
