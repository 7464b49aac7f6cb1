"""The classes of a world and their cut-outs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from PIL import Image

TILE = 64
LEAST_AREA = 20  # opaque pixels below which an object is not shown


@dataclass(frozen=True)
class ObjectClass:
    """One noun and its cut-outs (RGBA, cropped to alpha > 127): for training, for held-out splits."""

    name: str
    plural: str
    theme: str
    train: tuple[Image.Image, ...]
    held_out: tuple[Image.Image, ...]

    def cutouts(self, held_out: bool) -> tuple[Image.Image, ...]:
        return self.held_out if held_out else self.train


def crop_to_alpha(image: Image.Image) -> Image.Image:
    """Crops an RGBA picture to the bounding box of alpha > 127 (unchanged where nothing is that opaque)."""
    box = image.getchannel("A").point([0] * 128 + [255] * 128).getbbox()
    return image.crop(box) if box else image


def embedded_objects() -> tuple[ObjectClass, ...]:
    """The 60 shipped classes, in the order of `objects.json`; one cut-out each, shown in every split."""
    folder = resources.files("csp_jax.world") / "objects"
    entries = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    with (folder / "atlas.png").open("rb") as stream:
        atlas = Image.open(stream).convert("RGBA")
    columns = atlas.width // TILE
    classes = []
    for number, entry in enumerate(entries):
        left, top = number % columns * TILE, number // columns * TILE
        cutout = crop_to_alpha(atlas.crop((left, top, left + TILE, top + TILE)))
        classes.append(ObjectClass(entry["name"], entry["plural"], entry["theme"], train=(cutout,), held_out=(cutout,)))
    return tuple(classes)
