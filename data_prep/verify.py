"""`--verify`: re-read everything that a run wrote, and hold it against what it says of itself."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from csp_jax.errors import UserError
from csp_jax.manifest import MANIFEST, Manifest, open_shard, verify_checksums
from csp_jax.records import Record, decode, decode_mask, read_manifest
from data_prep.ledger import LEDGER, REJECTS, entry_totals, read_lines
from data_prep.pack import check_totals

MEND = "Prepare the data set again with --overwrite"


@dataclass
class Seen:
    """What was met on the way."""

    records: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    pictures: dict[str, str] = field(default_factory=dict)  # image id -> its split
    image_bytes: int = 0
    perturbed_bytes: int = 0


def verify(directory: Path) -> Counter[str]:
    """The totals of a prepared data set after reading all of it.

    Checks checksums, every record, every picture's decoding, masks and boxes against the pictures' sizes, unique
    ids, one split a picture, and that ledger, rejects and manifest add up. UserError names the first mistake.
    """
    manifest = read_manifest(directory)
    seen = Seen()
    for name in manifest.splits:
        verify_checksums(manifest, name)
        _read_split(manifest, name, seen)
    totals = _check_ledger(manifest, seen)
    totals["image_bytes"], totals["perturbed_bytes"] = seen.image_bytes, seen.perturbed_bytes
    return totals


def _read_split(manifest: Manifest, name: str, seen: Seen) -> None:
    split = manifest.split(name)
    for shard in split.shards:
        reader = open_shard(manifest.directory, shard)
        items = 0
        for place in range(shard.records):
            try:
                record = decode(reader.read([place])[0])
                _check_record(record, name, seen)
            except (UserError, RuntimeError, ValueError) as error:
                problem = f"record {place}: {getattr(error, 'problem', error)}"
                raise UserError(problem, file=manifest.directory / shard.file, mend=MEND) from None
            items += len(record.items)
        reader.close()
        if items != shard.items:
            problem = f"holds {items} questions, its manifest says {shard.items}"
            raise UserError(problem, file=manifest.directory / shard.file, mend=MEND)
        seen.records[name] += shard.records
        seen.items[name] += items


def _check_record(record: Record, split: str, seen: Seen) -> None:
    for identifier in (f"record {record.id}", *(f"item {item.id}" for item in record.items)):
        if identifier in seen.ids:
            raise ValueError(f"{identifier} is there twice")
        seen.ids.add(identifier)
    if seen.pictures.setdefault(record.image_id, split) != split:
        raise ValueError(f"the picture {record.image_id} is in another split, too")
    sizes = [_size(data) for data in record.images]
    seen.image_bytes += sum(map(len, record.images))
    for region in record.regions:
        width, height = sizes[region.image]
        mask = decode_mask(region.mask, height, width)
        x0, y0, x1, y1 = region.box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"the box {region.box} of {region.keyword!r} leaves the picture of {width} x {height}")
        if not mask.any():
            raise ValueError(f"the mask of {region.keyword!r} is empty")
    for item in record.items:
        if item.perturbed_image:
            _size(item.perturbed_image)
            seen.perturbed_bytes += len(item.perturbed_image)


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture as training opens it, after decoding it whole."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return ImageOps.exif_transpose(picture).size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"a picture cannot be read ({error})") from None


def _check_ledger(manifest: Manifest, seen: Seen) -> Counter[str]:
    path = manifest.directory / LEDGER
    if not path.exists():
        raise UserError("is missing: this data set was not made by csp-prep, or not whole", file=path, mend=MEND)
    totals: Counter[str] = Counter()
    records, items = Counter[str](), Counter[str]()
    numbers = []
    for _, entry in read_lines(path):
        totals.update(entry_totals(entry))
        records[entry["split"]] += entry["record"]
        items[entry["split"]] += entry["items"]
        numbers.append(entry["unit"])
        if entry["record"] and entry["split"] not in manifest.splits:
            raise UserError(
                f"unit {entry['unit']} is in split {entry['split']!r}, which is missing", file=path, mend=MEND
            )
    if numbers != list(range(len(numbers))):
        raise UserError("does not hold every unit once and in order", file=path, mend=MEND)
    for name in manifest.splits:
        if (records[name], items[name]) != (seen.records[name], seen.items[name]):
            problem = f"{records[name]} records with {items[name]} questions in {name}, the shards have "
            problem += f"{seen.records[name]} with {seen.items[name]}"
            raise UserError(problem, file=path, mend=MEND)
        if manifest.splits[name].metadata.get("totals") != dict(totals):
            raise UserError(f"the totals of {name} are not those of the ledger", file=manifest.directory / MANIFEST)
    if not (manifest.directory / REJECTS).exists():
        raise UserError("is missing", file=manifest.directory / REJECTS, mend=MEND)
    rejects = sum(1 for line in (manifest.directory / REJECTS).open(encoding="utf-8") if json.loads(line))
    if rejects != totals["rejected"]:
        problem = f"{rejects} rejects, the ledger has {totals['rejected']}"
        raise UserError(problem, file=manifest.directory / REJECTS, mend=MEND)
    check_totals(totals)
    return totals
