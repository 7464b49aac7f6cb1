"""`csp-prep inspect`: one page that shows what a finished data set holds; pictures and all in a single file."""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from csp_jax.records import Item, Record, decode_mask, read_manifest
from data_prep.compare import records
from data_prep.config import ImagesConfig
from data_prep.ledger import LEDGER, entry_totals, read_lines
from data_prep.perturb import Schedule, bury, seeded
from data_prep.pictures import jpeg, open_picture

LEVELS = (100, 75, 50, 25, 0)
SIDE = 220  # of a picture on the sheet
COLOURS = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#a05ecc", "#2e86ab")
AREAS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
KEYWORDS = 30
SCHEDULE = Schedule("linear")

Pixels = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "height width"]


def outlined(record: Record, pixels: Pixels) -> Pixels:
    """The picture with every region's box and the outline of its mask."""
    height, width = pixels.shape[:2]
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    thick = max(1, round(max(height, width) / 250))
    for number, region in enumerate(record.regions):
        colour = COLOURS[number % len(COLOURS)]
        x0, y0, x1, y1 = region.box
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=thick)
        edge = outline(decode_mask(region.mask, height, width), thick)
        drawn.paste(Image.new("RGB", drawn.size, colour), mask=Image.fromarray(edge))
    return np.asarray(drawn)


def outline(mask: Mask, thick: int = 1) -> Mask:
    """The mask's pixels that are at most `thick` away from what it leaves out."""
    inner = mask.copy()
    for _ in range(thick):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def sheet_row(record: Record) -> dict[str, Any]:
    """One picture of the contact sheet: with boxes and outlines, buried to five levels, and its questions."""
    _, pixels = open_picture(record.images[0], ImagesConfig(gray="convert", cmyk="convert"))
    height, width = pixels.shape[:2]
    first = next((item for item in record.items if item.regions), None)
    mask = np.zeros((height, width), bool)
    for index in first.regions if first else ():
        mask |= decode_mask(record.regions[index].mask, height, width)
    # Noise is laid on the small picture: scaling a noised one down would average it away.
    small, small_mask = _small(pixels), _small(mask.astype(np.uint8) * 255) >= 128
    levels = [(n, bury(small, small_mask, n, SCHEDULE, seeded(0, record.id, n), "closed")) for n in LEVELS]
    return {
        "id": record.id,
        "keywords": list(dict.fromkeys(region.keyword for region in record.regions)),
        "picture": _embedded(_small(outlined(record, pixels))),
        "levels": [(level, _embedded(shown)) for level, shown in levels] if mask.any() else [],
        "questions": [_question(item) for item in record.items[:6]],
        "more": max(0, len(record.items) - 6),
    }


def _question(item: Item) -> dict[str, str]:
    return {"question": item.question, "response": item.response, "keyword": item.keyword}


def _small(pixels: UInt8[np.ndarray, "height width ..."]) -> UInt8[np.ndarray, "rows columns ..."]:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def _embedded(pixels: Pixels) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(pixels, 85)).decode()


def bars(counts: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows of a bar chart; the longest bar is 100."""
    most = max((count for _, count in counts), default=1) or 1
    return [{"name": name, "count": count, "width": round(100 * count / most, 1)} for name, count in counts]


def area_bars(areas: list[float]) -> list[dict[str, Any]]:
    """How many masks cover which share of their picture."""
    found, _ = np.histogram(areas, AREAS)
    names = [f"{low:.1%} – {high:.1%}" for low, high in itertools.pairwise(AREAS)]
    return bars(list(zip(names, found.tolist())))


def page(directory: Path, split: str, pictures: int) -> str:
    """The page of one split as HTML. UserError when there is no such data set or split."""
    manifest = read_manifest(directory)
    total = manifest.split(split).records
    chosen = set(np.linspace(0, total - 1, min(pictures, total)).round().astype(int).tolist())
    areas: list[float] = []
    keywords: Counter[str] = Counter()
    rows = []
    for number, record in enumerate(records(directory, split)):
        for region in record.regions:
            areas.append(float(region.mask[1::2].sum() / max(1, region.mask.sum())))
        keywords.update(item.keyword for item in record.items if item.keyword)
        if number in chosen:
            rows.append(sheet_row(record))
    totals: Counter[str] = Counter()
    for _, entry in read_lines(directory / LEDGER):
        totals.update(entry_totals(entry))
    reasons = Counter({name.partition(".")[2]: n for name, n in totals.items() if name.startswith("rejected.")})
    counted = Counter({name.partition(".")[2]: n for name, n in totals.items() if name.startswith("counted.")})
    environment = jinja2.Environment(loader=jinja2.PackageLoader("data_prep"), autoescape=True)
    return environment.get_template("inspect.html").render(
        title=f"{manifest.dataset} · {split}",
        records=total,
        items=manifest.split(split).items,
        totals=totals,
        rows=rows,
        areas=area_bars(areas),
        keywords=bars(keywords.most_common(KEYWORDS)),
        different=len(keywords),
        reasons=bars(reasons.most_common()),
        counted=bars(counted.most_common()),
    )
