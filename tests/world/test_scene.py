"""Masks against the rendered pixels, and geometry against scipy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from csp_jax.errors import UserError
from csp_jax.world import World, WorldConfig
from csp_jax.world.scene import Scene, dilate

SQUARE = np.ones((3, 3), bool)


def coverage(scene: Scene) -> np.ndarray:
    """How much of each pixel the objects cover, 0..255, measured from pixels: on white less on black."""
    white, black = (
        dataclasses.replace(scene, background=np.full_like(scene.background, shade)).render().astype(int)
        for shade in (255, 0)
    )
    return 255 - (white - black)[..., 0]


def scenes(world: World, number: int = 60) -> list[Scene]:
    return [world.scene(split, index) for split in ("base", "test") for index in range(number)]


def test_masks_are_the_pixels_that_an_object_covers_and_no_later_one_does(world):
    for scene in scenes(world):
        solo = [coverage(dataclasses.replace(scene, objects=(placed,))) > 127 for placed in scene.objects]
        for number, mask in enumerate(scene.visible_masks()):
            above = np.any([*solo[number + 1 :], np.zeros_like(mask)], axis=0)
            np.testing.assert_array_equal(mask, solo[number] & ~above)


def test_without_an_object_nothing_changes_beyond_its_edge(world):
    for scene in scenes(world):
        picture = scene.render()
        for number, mask in enumerate(scene.visible_masks()):
            change = np.abs(picture.astype(int) - scene.render(without=number)).max(-1)
            away = ndimage.distance_transform_cdt(~mask, metric="chessboard")
            assert change[away > 2].max() <= 4  # of 255: faint rings of the resampling filter
            assert not change[away > 4].any()
            inside = ndimage.binary_erosion(mask, SQUARE)
            assert (change[inside] > 0).sum() >= 0.9 * inside.sum()


def test_each_object_is_visible_and_on_the_canvas(world):
    for scene in scenes(world, 150):
        assert 1 <= len(scene.objects) <= 5
        for placed, mask in zip(scene.objects, scene.visible_masks(), strict=True):
            assert mask.sum() >= 0.7 * placed.sprite.mask.sum() > 0


def test_only_the_planned_pair_touches(world):
    touching = 0
    for scene in scenes(world, 150):
        masks = scene.visible_masks()
        for i, first in enumerate(masks):
            for j in range(i):
                places = {scene.objects[i].sprite.place, scene.objects[j].sprite.place}
                planned = scene.plan.touching is not None and places == set(scene.plan.touching)
                grown = [ndimage.binary_dilation(mask, SQUARE) for mask in (first, masks[j])]
                assert (grown[0] & grown[1]).any() == planned
                touching += planned
    assert touching > 60


def test_sizes_lie_in_their_ranges_with_a_gap_between(world):
    sides: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    for scene in scenes(world, 150):
        for placed in scene.objects:
            sides[placed.sprite.size].append(max(placed.sprite.alpha.shape))
    assert {name: (min(values), max(values)) for name, values in sides.items()} == {
        "small": (12, 17),
        "medium": (18, 25),
        "large": (26, 34),
    }


def test_dilation_is_scipys():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 9), (17, 4)):
        mask = rng.random(shape) < 0.2
        np.testing.assert_array_equal(dilate(mask), ndimage.binary_dilation(np.pad(mask, 1), SQUARE))


def test_objects_that_cannot_fit_are_refused():
    world = World(WorldConfig(canvas=64, small=(28, 29), medium=(30, 30), large=(31, 32), statistics_scenes=100))
    crowded = next(i for i in range(50) if sum(world.plan("base", i).counts) == 5)
    with pytest.raises(UserError, match=r"objects do not fit on the canvas.*smaller sizes"):
        world.scene("base", crowded)
