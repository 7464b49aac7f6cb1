"""A world from folders: what is held out, how nouns are found, and what is said about bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.world import World, WorldConfig
from csp_jax.world.captions import head_noun, plural_of
from csp_jax.world.folders import PhotoBackgrounds, folder_objects

NOUNS = ("cat", "mug", "tree", "fish", "bus", "lamp", "shoe", "kite", "drum")
SIDES = (12, 68)


def cutout(seed: int, side: int = 48) -> Image.Image:
    """A blot in one flat colour that no other seed has."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[..., :3] = (seed % 4 * 80, seed // 4 % 4 * 80, seed // 16 * 20 + 15)
    y, x = np.mgrid[:side, :side] / side - 0.5
    shape = np.hypot(x, y) < 0.3 + 0.15 * np.cos(np.arctan2(y, x) * rng.integers(2, 7) + seed)
    pixels[..., 3] = 255 * shape
    return Image.fromarray(pixels)


def save(folder: Path, name: str, picture: Image.Image, caption: str | None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\nzz=another language\n", encoding="utf-8")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    objects, backgrounds = tmp_path / "objects", tmp_path / "backgrounds"
    for place, noun in enumerate(NOUNS):
        for copy in range(3):
            theme = "outside" if place % 2 else "inside"
            save(objects, f"{theme}/{noun}-{copy}.png", cutout(3 * place + copy), f"A little {noun}.")
    save(objects, "inside/spoon.webp", cutout(90), "A spoon from the kitchen.")
    save(objects, "inside/pair.png", cutout(91), "Two spoons.")
    backgrounds.mkdir()
    for number in range(4):
        grey = np.full((100, 150, 3), 40 * number + 20, np.uint8)
        Image.fromarray(grey).save(backgrounds / f"{number}.jpg", quality=95)
    return objects, backgrounds


def test_nouns_themes_and_skipped_files(folders):
    found = folder_objects(folders[0], sides=SIDES)
    by_name = {item.name: item for item in found.classes}
    assert set(by_name) == {*NOUNS, "spoon"}
    assert by_name["cat"].theme == "inside"
    assert by_name["mug"].theme == "outside"
    assert by_name["bus"].plural == "buses"
    assert found.skipped == {"inside/pair.png": "the caption names no one thing"}


def test_cutouts_are_held_out_and_lone_ones_are_for_training_only(folders):
    for item in folder_objects(folders[0], sides=SIDES).classes:
        train = {cutout.tobytes() for cutout in item.train}
        held_out = {cutout.tobytes() for cutout in item.held_out}
        assert not train & held_out
        assert (len(train), len(held_out)) == ((1, 0) if item.name == "spoon" else (2, 1))


def test_look_alikes_stay_on_one_side(folders):
    original = cutout(200)
    for name, picture in {
        "a": original,
        "b": original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "c": original.resize((96, 96)),
    }.items():
        save(folders[0], f"inside/{name}.png", picture, "A spade.")
    (spade,) = [item for item in folder_objects(folders[0], sides=SIDES).classes if item.name == "spade"]
    assert (len(spade.train), len(spade.held_out)) == (3, 0)


def test_a_class_file_renames_and_leaves_out(folders, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"inside/spoon.webp": "ladle", "inside/cat-0.png": None}))
    found = folder_objects(folders[0], sides=SIDES, classes=names, exclude=("outside/*",))
    by_name = {item.name: len(item.train) + len(item.held_out) for item in found.classes}
    assert by_name["ladle"] == 1
    assert by_name["cat"] == 2
    assert "mug" not in by_name
    assert found.skipped["inside/cat-0.png"] == "left out by the class file"


def test_held_out_scenes_show_and_ask_only_what_training_does_not_show(folders):
    objects, backgrounds = folders
    world = World(
        WorldConfig(
            name="photos",
            objects=str(objects),
            backgrounds=str(backgrounds),
            statistics_scenes=100,
            brightness=0,
            zipf=0,
        )
    )
    flat = {seed: np.asarray(cutout(seed))[24, 24, :3].astype(int) for seed in (*range(27), 90)}
    shades: dict[str, set[int]] = {}
    shown: dict[str, set[int]] = {}
    for split in ("base", "train", "validation", "test"):
        group = "held out" if split in ("validation", "test") else "training"
        for index in range(60):
            scene = world.scene(split, index)
            shades.setdefault(group, set()).add(int(scene.background[40, 40, 0]))
            for placed in scene.objects:
                colour = np.median(placed.sprite.colours[placed.sprite.mask], axis=0)
                distance = {seed: np.abs(colour - flat[seed]).max() for seed in flat}
                nearest = min(distance, key=distance.__getitem__)
                assert distance[nearest] < 10  # half of what lies between two cut-outs
                shown.setdefault(group, set()).add(nearest)
            if group == "held out":
                asked = {item.keyword for item in world.record(split, index).items}
                assert "spoon" not in asked
    assert min(abs(a - b) for a in shades["training"] for b in shades["held out"]) > 30
    assert len(shown["held out"]) == len(NOUNS)
    assert len(shown["training"]) == 2 * len(NOUNS) + 1
    assert not shown["training"] & shown["held out"]


def test_classes_that_cannot_be_tested_can_be_left_out(folders):
    world = World(WorldConfig(objects=str(folders[0]), statistics_scenes=100, shared_only=True))
    assert {item.name for item in world.classes} == set(NOUNS)


def test_photo_backgrounds_fill_the_canvas(folders):
    painter = PhotoBackgrounds(folders[1], 64)
    assert sorted(painter.names[False] + painter.names[True]) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert len(painter.names[True]) == 1
    picture = painter.paint(np.random.default_rng(0), held_out=True)
    assert picture.shape == (64, 64, 3)
    assert np.ptp(picture.astype(int)) <= 2


def test_bad_files_are_named_with_the_mend(folders, tmp_path):
    objects, backgrounds = folders
    with pytest.raises(UserError, match=r"nowhere.*Give the path of a folder"):
        folder_objects(tmp_path / "nowhere", sides=SIDES)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no cut-outs with a name found.*alpha"):
        folder_objects(empty, sides=SIDES)
    save(objects, "flat.png", Image.new("RGB", (20, 20)), "A brick.")
    with pytest.raises(UserError, match=r"flat.png.*opaque everywhere.*alpha channel"):
        folder_objects(objects, sides=SIDES)
    save(objects, "flat.png", Image.new("RGBA", (20, 20), (9, 9, 9, 90)), "A brick.")
    with pytest.raises(UserError, match=r"flat.png.*nothing in the picture"):
        folder_objects(objects, sides=SIDES)
    (objects / "flat.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match=r"flat.png.*cannot read the picture.*Replace the file"):
        folder_objects(objects, sides=SIDES)
    assert folder_objects(objects, sides=SIDES, exclude=("flat.png",)).classes
    (backgrounds / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad.jpg.*cannot read"):
        PhotoBackgrounds(backgrounds, 80)
    with pytest.raises(UserError, match="at least two background pictures"):
        PhotoBackgrounds(backgrounds, 80, exclude=("[123].jpg", "bad.jpg"))
    with pytest.raises(UserError, match=r"only 4 nouns have two different cut-outs.*needs 8"):
        World(WorldConfig(objects=str(objects), exclude=("flat.png", "inside/*"), statistics_scenes=100))


@pytest.mark.parametrize("text", ["[1]", '{"a.png": ""}', "{", '{"a.png": 3}'])
def test_bad_class_files_are_named(folders, tmp_path, text):
    names = tmp_path / "names.json"
    names.write_text(text)
    with pytest.raises(UserError, match=r"names.json"):
        folder_objects(folders[0], sides=SIDES, classes=names)


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("An electric guitar.", "guitar"),
        ("A glass of water.", "glass"),
        ("A spiny lobster, from the Hawaiian islands.", "lobster"),
        ("A tree covered with snow.", "tree"),
        ("A jack-o'-lantern", "lantern"),
        ("cat  ", "cat"),
        ("Two flowers.", None),
        ("A pair of scissors.", None),
        ("This gun last saw service during World War 2.", None),
        ("“No U-Turn”.", None),
        ("", None),
        ("A 747", None),
    ],
)
def test_head_nouns(caption, noun):
    assert head_noun(caption) == noun


@pytest.mark.parametrize(
    ("noun", "plural"),
    [
        ("cat", "cats"),
        ("bus", "buses"),
        ("butterfly", "butterflies"),
        ("key", "keys"),
        ("fireman", "firemen"),
        ("knife", "knives"),
        ("goldfish", "goldfish"),
        ("traffic light", "traffic lights"),
        ("human", "humans"),
    ],
)
def test_plurals(noun, plural):
    assert plural_of(noun) == plural
