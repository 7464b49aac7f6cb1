"""Rows that cannot be used end in the reject file, each with its reason, and the counts add up."""

from __future__ import annotations

import copy
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import prep_samples
import pytest
from PIL import Image
from prep_runs import SOURCES, config_of, prepared, records, rejects

from csp_jax.errors import UserError
from csp_jax.families.interface import open_image
from csp_jax.records import decode_mask, encode
from data_prep.config import ImagesConfig
from data_prep.ledger import entry_totals
from data_prep.pack import check_totals, entry_of, make_record, split_of
from data_prep.pictures import open_picture
from data_prep.run import open_stages
from data_prep.sources.base import units
from data_prep.sources.registry import open_source
from data_prep.verify import verify


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def truncated() -> bytes:
    data = prep_samples.jpeg_bytes(1)
    return data[: len(data) // 2]


WHOLE = {"question": "Is there a mug in the image?", "answer": "yes", "image": "good.jpg"}
PICTURES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated.jpg": ("truncated_image", truncated),
    "empty.jpg": ("unreadable_image", lambda: b""),
    "text.jpg": ("unreadable_image", lambda: b"<html>404 not found</html>"),
    "huge.png": ("huge_image", lambda: encoded(Image.new("1", (7000, 7000)), "PNG")),
    "bomb.png": ("huge_image", lambda: encoded(Image.new("1", (20000, 20000)), "PNG")),
    "tiny.png": ("tiny_image", lambda: encoded(Image.new("RGB", (4, 4)), "PNG")),
    "narrow.png": ("narrow_image", lambda: encoded(Image.new("RGB", (16, 2000)), "PNG")),
    "gray.jpg": ("gray_image", lambda: encoded(prep_samples.picture(1).convert("L"))),
    "cmyk.jpg": ("cmyk_image", lambda: encoded(prep_samples.picture(1).convert("CMYK"))),
}


def test_every_kind_of_bad_row_has_its_reason(tmp_path):
    """Half of the rows are good; the bad ones between them fall out one by one."""
    root = tmp_path / "folder"
    root.mkdir()
    (root / "good.jpg").write_bytes(prep_samples.jpeg_bytes(0))
    (root / "0-mask.png").write_bytes(encoded(Image.fromarray(prep_samples.disc()), "PNG"))
    for name, (_, make) in PICTURES.items():
        (root / name).write_bytes(make())
    here = [{"box": list(prep_samples.BOX)}]
    bad = [({**WHOLE, "image": name}, reason) for name, (reason, _) in PICTURES.items()]
    bad += [
        ({**WHOLE, "image": "nowhere.jpg"}, "missing_image"),
        ({**WHOLE, "image": "good.jpg/deeper.jpg"}, "unreadable_image"),
        ({**WHOLE, "question": "  "}, "empty_question"),
        ({**WHOLE, "question": "Is there a \udcff in the image?"}, "bad_unicode"),
        ({**WHOLE, "question": "Is there a \ufffd\ufffd in the image?"}, "bad_unicode"),
        ({**WHOLE, "question": "Why?", "answer": "?"}, "no_keyword"),
        (WHOLE, "no_object"),
        ({**WHOLE, "regions": [{"box": [0, 0, 1, 1]}]}, "box_too_small"),
        ({**WHOLE, "regions": [{"box": [200, 0, 300, 50]}]}, "box_too_small"),
        ({**WHOLE, "regions": [{"box": [0, 0, 96, 72]}]}, "box_too_large"),
        ({**WHOLE, "regions": [{"box": list(prep_samples.BOX), "mask": "huge.png"}]}, "bad_mask"),
        ({"image": "good.jpg"}, "bad_row"),
        ({**WHOLE, "right": 7}, "bad_row"),
    ]
    good = {**WHOLE, "regions": here}
    unicode = {**good, "question": "画像に猫はいますか？ 🐈‍⬛ naïve e\u0301"}
    rows = [row for broken, _ in bad for row in (broken, good)] + [unicode]
    prep_samples.write_lines(root / "questions.jsonl", rows)
    done = prepared("folder", tmp_path, localize={"nothing": "reject"})
    found = rejects(done.directory)
    assert [reject["reason"] for reject in found] == [reason for _, reason in bad]
    assert [reject["where"] for reject in found] == [f"questions.jsonl:{2 * n + 1}" for n in range(len(bad))]
    totals = done.totals
    assert totals["rows"] == len(rows)
    assert totals["rejected"] == len(bad)
    assert totals["questions"] == len(bad) + 1
    assert sum(count for name, count in totals.items() if name.startswith("rejected.")) == len(bad)
    assert records(done.directory)[-1].items[0].question == unicode["question"]
    assert verify(done.directory)["records"] == len(bad) + 1


FATAL = {
    "pope": {(0,)},  # lines that begin with a list are taken for an array
    "coco": {("images",), ("annotations",), ("categories",), ("categories", 0), ("categories", 1)},
    "vqav2": {("questions",), ("annotations",)},
    "okvqa": {("questions",), ("annotations",)},
    "textvqa": {("data",)},
}
WRONG = (None, 3, "", "x\udcff", "\x00", [], {}, 1e999)
ABSENT = object()


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field of a JSON value; of lists, the first two entries."""
    keys = value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(whole: object, path: tuple, value: object) -> object:
    """A copy with another value at one place, or without it."""
    copied = copy.deepcopy(whole)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("source", [name for name in SOURCES if name != "rlaifv"])
def test_no_field_of_any_kind_ends_a_run(source, tmp_path):
    """Every field of every source's files with every kind of wrong value: a reject, or a question that can be packed.

    UserError is for what makes a whole file useless: it is no list of rows.
    """
    root = tmp_path / source
    prep_samples.BUILDERS[source](root)
    config = config_of(source, root, tmp_path / "out")
    stages, _ = open_stages(config)
    fatal: set[tuple] = set()
    for file in sorted({*root.rglob("*.json"), *root.rglob("*.jsonl")}):
        text = file.read_text()
        lines = text.count("\n") > 1
        whole = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        for path, value in itertools.product(list(places(whole)), (ABSENT, *WRONG)):
            broken = changed(whole, path, value)
            file.write_text("".join(json.dumps(row) + "\n" for row in broken) if lines else json.dumps(broken))
            try:
                made = list(units(open_source(config), group=False))
            except UserError:
                fatal.add(path[:2] if "categories" in path else path[:1])
                continue
            for stage in stages:
                stage(made)
            totals: Counter[str] = Counter()
            for unit in made:
                totals.update(entry_totals(entry_of(unit, split_of(unit.image_id, {"train": 1.0}))))
                assert not unit.items or encode(make_record(unit, source))
            check_totals(totals)
        file.write_text(text)
    assert fatal == FATAL.get(source, set())


def test_when_everything_is_rejected_the_run_says_why(tmp_path):
    root = tmp_path / "folder"
    prep_samples.write_lines(root / "questions.jsonl", [WHOLE, {**WHOLE, "question": ""}])
    with pytest.raises(UserError, match=r"1 x missing_image, 1 x empty_question"):
        prepared("folder", tmp_path)
    assert len(rejects(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("image", "settings"),
    [
        (prep_samples.picture(1).convert("L"), {"gray": "convert"}),
        (prep_samples.picture(1).convert("CMYK"), {"cmyk": "convert"}),
        (prep_samples.picture(1).convert("RGBA"), {}),
        (prep_samples.picture(1).convert("P"), {}),
    ],
    ids=["gray", "cmyk", "alpha", "palette"],
)
def test_what_is_packed_opens_in_training_as_the_stages_saw_it(image, settings):
    kind = "JPEG" if image.mode in ("L", "CMYK") else "PNG"
    data, pixels = open_picture(encoded(image, kind), ImagesConfig(**settings))
    np.testing.assert_array_equal(np.asarray(open_image(data)), pixels)


def test_turned_photographs_are_seen_upright(tmp_path):
    """A camera's EXIF turn: masks must lie on the picture that training opens, not on the one that is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(prep_samples.picture(3), exif=exif)
    data, pixels = open_picture(stored, ImagesConfig())
    assert data == stored
    assert pixels.shape == (prep_samples.WIDTH, prep_samples.HEIGHT, 3)
    np.testing.assert_array_equal(np.asarray(open_image(data)), pixels)
    root = tmp_path / "folder"
    root.mkdir()
    (root / "turned.jpg").write_bytes(stored)
    rows = [{**WHOLE, "image": "turned.jpg", "regions": [{"box": [10, 60, 40, 90]}]}]
    prep_samples.write_lines(root / "questions.jsonl", rows)
    (record,) = records(prepared("folder", tmp_path).directory)
    mask = decode_mask(record.regions[0].mask, *pixels.shape[:2])
    assert mask[60:90, 10:40].all()
    assert verify(tmp_path / "out")["records"] == 1


def test_huge_pictures_can_be_shrunk():
    image = prep_samples.picture(2, (960, 720))
    data, pixels = open_picture(encoded(image), ImagesConfig(most_pixels=100_000, huge="shrink"))
    height, width = pixels.shape[:2]
    assert height * width <= 100_000
    assert abs(width / height - 4 / 3) < 0.02
    np.testing.assert_array_equal(np.asarray(open_image(data)), pixels)
    small = np.asarray(image.resize((width, height)), float)
    assert np.abs(small - pixels).mean() < 6


def test_a_reject_names_what_a_person_needs_to_find_the_row(tmp_path):
    root = tmp_path / "folder"
    prep_samples.folder(root)
    rows = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    prep_samples.write_lines(root / "questions.jsonl", [*rows, {**WHOLE, "image": "gone.jpg", "id": "mug-7"}])
    done = prepared("folder", tmp_path)
    (reject,) = rejects(done.directory)
    assert reject["where"] == "questions.jsonl:4"
    assert reject["id"] == "mug-7"
    assert reject["stage"] == "decode"
    assert reject["detail"].endswith(str(Path("folder") / "gone.jpg"))
