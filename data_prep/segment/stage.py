"""The stage: a mask for every region that a question needs; annotated masks pass straight through."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool

from csp_jax.records import Item
from data_prep.config import SegmentConfig
from data_prep.masks import Pixels, Rectangle
from data_prep.segment.interface import Segmenter
from data_prep.unit import Region, Unit


class SegmentStage:
    """Fills the masks; `segmenter` None: a region without a mask of its own is its box."""

    name = "segment"

    def __init__(self, config: SegmentConfig, segmenter: Segmenter | None, several: str = "all"):
        self.config, self.segmenter, self.union = config, segmenter, several == "union"

    def __call__(self, batch: list[Unit]) -> None:
        for unit in batch:
            needed = sorted({index for item in unit.items for index in item.regions})
            if not needed:
                continue
            self._segment(unit, [index for index in needed if unit.regions[index].mask is None])
            bad = {index: problem for index in needed if (problem := self._check(unit, index))}
            for item in list(unit.items):
                self._drop(unit, item, bad)
            if self.union:
                self._unite(unit)

    def _segment(self, unit: Unit, indices: list[int]) -> None:
        boxes = [unit.regions[index].box for index in indices]
        if self.segmenter is None or not boxes:
            for index, box in zip(indices, boxes):
                unit.regions[index].mask = Rectangle(box)
            return
        assert unit.picture is not None
        for index, found in zip(indices, self.segmenter(unit.picture, boxes), strict=True):
            region = unit.regions[index]
            region.mask, region.mask_score = Pixels(found.mask), found.score

    def _check(self, unit: Unit, index: int) -> str:
        """Empty, or why the region cannot be used; a mask beyond the limits becomes its box if so configured."""
        region = unit.regions[index]
        try:
            mask = unit.mask(index)
        except ValueError as error:
            return f"bad_mask: {error}"
        region.mask = Pixels(mask)  # rendered once
        problem = self._limits(region, mask)
        if not problem or region.origin == "whole":
            return ""
        if self.config.otherwise == "reject":
            return problem
        unit.counts[f"box_for_{problem}"] += 1
        region.mask = Rectangle(region.box)
        return "" if unit.mask(index).any() else "mask_too_small"

    def _limits(self, region: Region, mask: Bool[np.ndarray, "height width"]) -> str:
        covered = np.count_nonzero(mask)
        area = covered / mask.size
        x0, y0, x1, y1 = region.box
        if not covered or area < self.config.least_area:
            return "mask_too_small"
        if area > self.config.most_area:
            return "mask_too_large"
        if covered < self.config.least_filled * (x1 - x0) * (y1 - y0):
            return "mask_too_thin"
        return "mask_too_unsure" if region.mask_score < self.config.least_score else ""

    def _drop(self, unit: Unit, item: Item, bad: dict[int, str]) -> None:
        """Take bad regions from a question; without any left it is rejected."""
        left = tuple(index for index in item.regions if index not in bad)
        if left == item.regions:
            return
        if left:
            unit.counts["masks_dropped"] += len(item.regions) - len(left)
            unit.replace(item, regions=left)
        else:
            reason, _, detail = bad[item.regions[0]].partition(": ")
            unit.reject(item, self.name, reason, detail or item.keyword)

    def _unite(self, unit: Unit) -> None:
        """Several regions of a question become one: the union of their masks in the box around their boxes."""
        united: dict[tuple[int, ...], int] = {}
        for item in list(unit.items):
            if len(item.regions) < 2:
                continue
            if item.regions not in united:
                parts = [unit.regions[index] for index in item.regions]
                x0, y0 = (min(part.box[side] for part in parts) for side in (0, 1))
                x1, y1 = (max(part.box[side] for part in parts) for side in (2, 3))
                mask = np.any([unit.mask(index) for index in item.regions], axis=0)
                best = max(parts, key=lambda part: part.score)
                unit.regions.append(dataclasses.replace(best, box=(x0, y0, x1, y1), mask=Pixels(mask)))
                united[item.regions] = len(unit.regions) - 1
            unit.replace(item, regions=(united[item.regions],))
            unit.counts["united"] += 1
