"""`csp-prep compare`: the masks of one data set against those of another, such as a segmenter's against annotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csp_jax.errors import UserError
from csp_jax.manifest import open_shard
from csp_jax.records import Record, Region, decode, decode_mask, read_manifest
from data_prep.config import ImagesConfig
from data_prep.masks import Rectangle
from data_prep.pictures import open_picture

BINS = ((0.0, 0.01), (0.01, 0.05), (0.05, 0.2), (0.2, 1.01))  # of the true mask's share of the picture


@dataclass(frozen=True)
class Pair:
    """One region in both data sets: shares of overlap, and the share of the picture that it truly covers."""

    found: float  # IoU of the mask that was found
    box: float  # IoU of the bare box
    area: float


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def records(directory: Path, split: str) -> Iterator[Record]:
    """The records of a split, in order."""
    manifest = read_manifest(directory)
    for shard in manifest.split(split).shards:
        reader = open_shard(directory, shard)
        for place in range(shard.records):
            yield decode(reader.read([place])[0])
        reader.close()


def pairs(truth: Path, found: Path, split: str) -> Iterator[Pair]:
    """Every region of `found` whose keyword and box `truth` has for the same picture."""
    known: dict[str, dict[tuple[str, tuple[float, ...]], Region]] = {}
    for record in records(truth, split):
        known.setdefault(record.image_id, {}).update({(r.keyword, r.box): r for r in record.regions})
    settings = ImagesConfig(gray="convert", cmyk="convert")
    for record in records(found, split):
        matched = [(r, known.get(record.image_id, {}).get((r.keyword, r.box))) for r in record.regions]
        if not any(true for _, true in matched):
            continue
        height, width = open_picture(record.images[0], settings)[1].shape[:2]
        for region, true in matched:
            if true is None:
                continue
            exact = decode_mask(true.mask, height, width)
            mask = decode_mask(region.mask, height, width)
            box = Rectangle(region.box).render(height, width)
            yield Pair(overlap(mask, exact), overlap(box, exact), np.count_nonzero(exact) / exact.size)


def table(truth: Path, found: Path, split: str) -> list[dict[str, Any]]:
    """IoU by the size of the object, and over all; UserError when the two data sets share no region."""
    both = list(pairs(truth, found, split))
    if not both:
        mend = "Prepare one from the other: source {name: shards, masks: false}"
        raise UserError(f"has no picture and box of {truth}", file=found, mend=mend)
    groups = [(f"{low:.0%} to {min(high, 1):.0%} of the picture", low, high) for low, high in BINS]
    rows = []
    for title, low, high in [*groups, ("all", 0.0, 1.01)]:
        these = [pair for pair in both if low <= pair.area < high]
        if these:
            ious = np.array([pair.found for pair in these])
            rows.append(
                {
                    "object": title,
                    "regions": len(these),
                    "mean IoU": float(ious.mean()),
                    "median IoU": float(np.median(ious)),
                    "share above 0.5": float((ious > 0.5).mean()),
                    "share above 0.8": float((ious > 0.8).mean()),
                    "mean IoU of the bare box": float(np.mean([pair.box for pair in these])),
                }
            )
    return rows
