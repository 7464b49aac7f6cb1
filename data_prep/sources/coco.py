"""COCO instances: images, categories and annotations with their masks; the questions are ours."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from csp_jax.errors import UserError
from csp_jax.records import Item
from csp_jax.text import existence_question
from data_prep.config import CocoConfig
from data_prep.masks import coco_segmentation
from data_prep.sources.base import AnyRow, FileSource, read_json, text, yes_no_fields
from data_prep.unit import BadRow, ImageFile, Region, Row


class Coco(FileSource):
    """Existence questions: one for every category that a picture has, and as many for categories that it has not.

    Absent categories are drawn at random, or (`popular`) with the odds of how many pictures have them. The draw
    depends on the picture's id alone.
    """

    dataset = "coco"

    def __init__(self, config: CocoConfig):
        super().__init__(config.root, config.annotations, "annotations", config.images)
        self.config = config

    def rows(self) -> Iterator[AnyRow]:
        raw = read_json(self._file)
        try:
            names = {int(category["id"]): text(category, "name") for category in raw["categories"]}
            images, annotations = list(raw["images"]), list(raw["annotations"])
            if not all(names.values()):
                raise ValueError("name of a category")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"has no usable {error}"
            raise UserError(problem, file=self._file, mend="Use COCO's instances_*.json") from None
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for number, annotation in enumerate(annotations):
            if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int):
                of_image[annotation["image_id"]].append(annotation)
            else:
                yield BadRow(f"{self._file.name}:annotation {number}", "bad_row", "no usable image_id")
        # a category that is none makes its picture a bad row, below
        here = [
            {a["category_id"] for a in those if isinstance(a.get("category_id"), int)} for those in of_image.values()
        ]
        pictures = Counter(category for those in here for category in those)
        for image in images:
            yield from self._picture(image, names, of_image, pictures)

    def _picture(
        self,
        image: dict[str, Any],
        names: dict[int, str],
        of_image: dict[int, list[dict[str, Any]]],
        pictures: Counter[int],
    ) -> Iterator[AnyRow]:
        where = f"{self._file.name}:image {image.get('id')}" if isinstance(image, dict) else self._file.name
        try:
            identifier, file = int(image["id"]), ImageFile(self._images / text(image, "file_name"))
            picture = f"{self.dataset}-{image['file_name']}"
            regions = [(a["category_id"], self._region(image, names, a)) for a in of_image[identifier]]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            yield BadRow(where, "bad_row", repr(error))
            return
        crowds = {a["category_id"] for a in of_image[identifier] if a.get("iscrowd")}
        single = {a["category_id"] for a in of_image[identifier] if not a.get("iscrowd")}
        present = sorted(single | (crowds if self.config.crowds else set()))
        for category in present:
            mine = tuple(region for own, region in regions if own == category)
            yield Row(where, picture, file, self._item(identifier, names[category], "yes", len(mine)), mine)
        for category in self._absent(identifier, names, single | crowds, len(present), pictures):
            yield Row(where, picture, file, self._item(identifier, names[category], "no", 0))

    def _region(self, image: dict[str, Any], names: dict[int, str], annotation: dict[str, Any]) -> Region:
        left, top, width, height = (float(number) for number in annotation["bbox"])
        mask = coco_segmentation(annotation["segmentation"], image["height"], image["width"])
        return Region(names[annotation["category_id"]], (left, top, left + width, top + height), mask=mask)

    def _absent(
        self, identifier: int, names: dict[int, str], present: set[int], count: int, pictures: Counter[int]
    ) -> list[int]:
        absent = sorted(set(names) - present)
        if self.config.absent == "none" or not absent:
            return []
        odds = np.array([pictures[category] if self.config.absent == "popular" else 1 for category in absent], float)
        usable = int((odds > 0).sum())
        generator = np.random.default_rng(abs(identifier))
        chosen = generator.choice(
            len(absent), min(count, usable), replace=False, p=odds / odds.sum() if usable else None
        )
        return [absent[place] for place in chosen]

    def _item(self, identifier: int, noun: str, truth: str, regions: int) -> Item:
        return Item(
            id=f"{self.dataset}-{identifier}-{noun.replace(' ', '_')}",
            question=existence_question(noun),
            keyword=noun,
            regions=tuple(range(regions)),
            category="existence",
            **yes_no_fields(truth),
        )
