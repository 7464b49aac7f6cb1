"""A finished data set as a source: to segment it again, to materialize its noise, to regroup or split it anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from csp_jax.errors import UserError
from csp_jax.manifest import MANIFEST, open_shard
from csp_jax.records import Record, decode, read_manifest
from data_prep.config import ShardsConfig
from data_prep.masks import RowRuns
from data_prep.sources.base import AnyRow, Source
from data_prep.unit import BadRow, ImageBytes, Region, Row


class Shards(Source):
    """The records of one split; items of several pictures and materialized ones are rejected."""

    def __init__(self, config: ShardsConfig):
        self.config = config
        self._manifest = read_manifest(config.root)
        self._split = self._manifest.split(config.split)
        self.dataset = self._manifest.dataset

    def files(self) -> list[Path]:
        return [Path(self.config.root) / MANIFEST]

    def count(self) -> int:
        return self._split.items

    def rows(self) -> Iterator[AnyRow]:
        for shard in self._split.shards:
            reader = open_shard(self._manifest.directory, shard)
            for place in range(shard.records):
                where = f"{shard.file}:{place}"
                try:
                    record = decode(reader.read([place])[0])
                except (RuntimeError, UserError) as error:
                    yield BadRow(where, "bad_row", str(error))
                    continue
                yield from self._record(where, record)
            reader.close()

    def _record(self, where: str, record: Record) -> Iterator[AnyRow]:
        if len(record.images) != 1:
            yield from (BadRow(where, "bad_row", "several pictures", item.id) for item in record.items)
            return
        image = ImageBytes(record.images[0])
        regions = tuple(
            Region(r.keyword, r.box, r.score, RowRuns(r.mask) if self.config.masks else None) for r in record.regions
        )
        for item in record.items:
            if item.perturbed_image:
                yield BadRow(where, "bad_row", "a perturbed picture cannot be prepared again", item.id)
            elif self.config.regions:
                mine = tuple(regions[index] for index in item.regions)
                placed = dataclasses.replace(item, regions=tuple(range(len(mine))))
                yield Row(where, record.image_id, image, placed, mine)
            else:
                yield Row(where, record.image_id, image, dataclasses.replace(item, regions=()))
