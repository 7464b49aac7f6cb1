"""The stage: regions given by the source, or boxes of a detector that pass the limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from csp_jax.records import Item
from data_prep.config import LocalizeConfig
from data_prep.keywords.rule import nouns
from data_prep.localize.interface import Detection, Detector
from data_prep.masks import Rectangle
from data_prep.unit import Box, Region, Unit

Task = tuple[Unit, str]  # a picture and what to look for in it


class LocalizeStage:
    """Gives every question the regions of its keyword; `detector` None: only those of the source."""

    name = "localize"

    def __init__(self, config: LocalizeConfig, detector: Detector | None, batch: int):
        self.config, self.detector, self.batch = config, detector, batch

    def __call__(self, batch: list[Unit]) -> None:
        if not self.config.given:
            for unit in batch:
                unit.items = [dataclasses.replace(item, regions=()) for item in unit.items]
        open_items = [(unit, item) for unit in batch for item in list(unit.items) if not self._settled(unit, item)]
        found = self._detect((unit, item.keyword) for unit, item in open_items)
        if self.config.retry and self.detector is not None:
            others = {
                (unit.number, item.keyword): other
                for unit, item in open_items
                if not found[unit.number, item.keyword] and (other := _other_noun(item))
            }
            again = self._detect(
                (unit, others[unit.number, item.keyword])
                for unit, item in open_items
                if (unit.number, item.keyword) in others
            )
        else:
            others, again = {}, {}
        for unit, item in open_items:
            regions = found[unit.number, item.keyword]
            other = others.get((unit.number, item.keyword), "")
            if not regions and other and again[unit.number, other]:
                unit.counts["found_on_retry"] += 1
                item, regions = unit.replace(item, keyword=other), again[unit.number, other]
            self._settle(unit, item, regions)

    def _settled(self, unit: Unit, item: Item) -> bool:
        """Does this question need no detector? The source gave its regions, or its object is known to be absent."""
        if item.regions:
            kept = [index for index in item.regions if self._fits(unit, unit.regions[index].box) == ""]
            if not kept:
                unit.reject(item, self.name, self._fits(unit, unit.regions[item.regions[0]].box))
                return True
            for index in kept:
                region = unit.regions[index]
                region.box, region.keyword = _clip(region.box, unit.size), region.keyword or item.keyword
            unit.counts["regions_given"] += 1
            unit.counts["boxes_dropped"] += len(item.regions) - len(kept)
            unit.replace(item, regions=tuple(kept))
            return True
        if not item.keyword:
            return True  # kept without one on request
        if item.category == "existence" and item.truth == "no" and self.config.absent != "search":
            if self.config.absent == "reject":
                unit.reject(item, self.name, "absent_object", item.keyword)
            else:
                unit.counts["absent_kept"] += 1
            return True
        return False

    def _detect(self, tasks: Iterable[Task]) -> dict[tuple[int, str], list[int]]:
        """(unit number, keyword) -> indices of the regions that were added to the unit; each is looked for once."""
        wanted: dict[tuple[int, str], Unit] = {(unit.number, keyword): unit for unit, keyword in tasks}
        result: dict[tuple[int, str], list[int]] = {key: [] for key in wanted}
        if self.detector is None:
            return result
        keys = list(wanted)
        for start in range(0, len(keys), self.batch):
            part = keys[start : start + self.batch]
            pictures = [picture for key in part if (picture := wanted[key].picture) is not None]
            for key, detections in zip(part, self.detector(pictures, [keyword for _, keyword in part]), strict=True):
                result[key] = self._keep(wanted[key], key[1], detections)
        return result

    def _keep(self, unit: Unit, keyword: str, detections: list[Detection]) -> list[int]:
        kept: list[Detection] = []
        for detection in sorted(detections, key=lambda d: -d.score):
            problem = self._fits(unit, detection.box)
            if problem:
                unit.counts["boxes_dropped"] += 1
            else:
                kept.append(Detection(_clip(detection.box, unit.size), detection.score))
        most = 1 if self.config.several == "best" else self.config.most
        unit.counts["boxes_beyond_most"] += max(0, len(kept) - most)
        start = len(unit.regions)
        unit.regions += [Region(keyword, d.box, d.score, origin="detector") for d in kept[:most]]
        return list(range(start, len(unit.regions)))

    def _settle(self, unit: Unit, item: Item, regions: list[int]) -> None:
        if regions:
            unit.counts["found"] += 1
            unit.counts["found_several"] += len(regions) > 1
            unit.replace(item, regions=tuple(regions))
        elif self.config.nothing == "whole":
            unit.counts["whole_picture"] += 1
            height, width = unit.size
            box = (0.0, 0.0, float(width), float(height))
            unit.regions.append(Region(item.keyword, box, 0.0, mask=Rectangle(box), origin="whole"))
            unit.replace(item, regions=(len(unit.regions) - 1,))
        elif self.config.nothing == "keep":
            unit.counts["kept_without_object"] += 1
        else:
            unit.reject(item, self.name, "no_object", item.keyword)

    def _fits(self, unit: Unit, box: Box) -> str:
        """Empty, or why a box is not used."""
        x0, y0, x1, y1 = _clip(box, unit.size)
        height, width = unit.size
        share = max(0.0, x1 - x0) * max(0.0, y1 - y0) / (height * width)
        if x1 <= x0 or y1 <= y0 or share < self.config.least_area:
            return "box_too_small"
        return "box_too_large" if share > self.config.most_area else ""


def _clip(box: Box, size: tuple[int, int]) -> Box:
    height, width = size
    x0, y0, x1, y1 = box
    return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)


def _other_noun(item: Item) -> str:
    """A noun of the question that is not the keyword; empty if there is none."""
    return next((noun for noun in nouns(item.question, item.response) if noun != item.keyword), "")
