"""Noise on a region of a picture: in every family it reaches the patches and views of that region, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_folders import FAMILIES
from PIL import Image
from tiny import GOLDEN, pack

from csp_jax.data.batch import Batch, Picture, Sample, Shape
from csp_jax.data.pictures import show
from csp_jax.families.interface import HostFamily
from csp_jax.families.registry import open_family
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.internvl2 import IMAGENET_STD
from csp_jax.models.registry import abstract_model
from csp_jax.models.vision import CLIP_STD
from csp_jax.perturb import Schedule, perturb, to_canvas

pytestmark = pytest.mark.usefixtures("exact")

SIZES = {
    "llava": (500, 380),
    "qwen2_vl": (220, 150),
    "internvl2": (300, 140),
    "phi3_vision": (330, 400),
    "qwen_vl": (400, 500),
}
BOXES = [(0.1, 0.15, 0.4, 0.5), (0.55, 0.6, 0.97, 0.9), (0.45, 0.45, 0.55, 0.55)]  # x0, y0, x1, y1 as shares
WITH_OVERVIEW = ("internvl2", "phi3_vision")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def host(family: str) -> HostFamily:
    return open_family(GOLDEN / FAMILIES[family], words=False)


@pytest.fixture(scope="module")
def model(family: str) -> VisionLanguageModel:
    """Shapes alone: what is shown of a picture needs no weights."""
    values = json.loads((GOLDEN / FAMILIES[family] / "config.json").read_text())
    return abstract_model(HubConfig(values, Path("config.json")))


def image(family: str, seed: int = 0) -> Image.Image:
    width, height = SIZES[family]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def region(family: str, box: tuple[float, float, float, float]) -> np.ndarray:
    width, height = SIZES[family]
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
    return mask


def batch_of(pictures: list[Picture], cells: int = 0) -> Batch:
    first = pictures[0]
    count = cells or sum(picture.cells for picture in pictures)
    shape = Shape(1, 4, 1, 0, 0, 1, len(pictures), first.cell, count)
    return pack(shape, [Sample((1,), tuple(pictures), ())])


def views(model: VisionLanguageModel, batch: Batch, noise: Schedule, seed: int = 0) -> np.ndarray:
    """[cells, height, width, 3] pixel values under noise."""
    arrays = (batch.canvas, batch.mask, batch.confidence, batch.noise_id)
    canvas = perturb(*map(jnp.asarray, arrays), jax.random.key(seed), noise)
    return np.asarray(model.pixels(batch, canvas))[0]


def clean_views(model: VisionLanguageModel, batch: Batch) -> np.ndarray:
    return np.asarray(model.pixels(batch, to_canvas(jnp.asarray(batch.canvas))))[0]


def tiles_of(batch: Batch, picture: Picture) -> tuple[np.ndarray, int]:
    """The mask of the canvas's cells, and how many they are."""
    count = picture.grid[0] * picture.grid[1]
    return batch.mask[0, :count], count


def reduce_with_pillow(change: np.ndarray, side: int) -> np.ndarray:
    """InternVL's thumbnail of a float picture."""
    layers = [Image.fromarray(np.ascontiguousarray(change[..., c])) for c in range(3)]
    return np.stack([np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC)) for layer in layers], axis=-1)


def reduce_with_torch(change: np.ndarray, side: int) -> np.ndarray:
    """Phi's view of the whole of a float picture."""
    values = torch.from_numpy(change.transpose(2, 0, 1).copy())[None]
    return torch.nn.functional.interpolate(values, size=(side, side), mode="bicubic")[0].numpy().transpose(1, 2, 0)


REDUCE = {"internvl2": reduce_with_pillow, "phi3_vision": reduce_with_torch}
STD = {"internvl2": IMAGENET_STD}


def as_canvas(change: np.ndarray, family: str) -> np.ndarray:
    """A difference of pixel values as one of canvases in [-1, 1]."""
    return change * np.array(STD.get(family, CLIP_STD), np.float32) * 2


def joined(cells: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    blocks = cells.reshape(rows, columns, *cells.shape[1:])
    return blocks.swapaxes(1, 2).reshape(rows * cells.shape[1], columns * cells.shape[2], -1)


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_a_region_goes_the_way_of_its_pixels(host, family, box):
    """White where the region is, black elsewhere: what is white on the canvas is in the mask, what is black is not."""
    mask = region(family, box)
    white = Image.fromarray(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255)
    canvas, found = host.canvas(white)[..., 0], host.canvas_mask(mask)
    if family == "phi3_vision":  # padding is white and in no region
        padding = host.canvas(Image.new("RGB", white.size))[..., 0] > 0
        assert not found[padding].any()
        canvas = np.where(padding, 0, canvas)
    clear = (canvas < 90) | (canvas > 165)
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(found[clear], canvas[clear] > 127)
    assert 0 < found.mean() < 0.7


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_noise_reaches_what_the_region_touches_and_nothing_else(host, model, family, box):
    picture = show(host, image(family), region(family, box), 0.0, 77)
    batch = batch_of([picture])
    change = views(model, batch, Schedule()) - clean_views(model, batch)
    mask, tiles = tiles_of(batch, picture)
    np.testing.assert_array_equal((change[:tiles] != 0).any(axis=-1), mask)
    touched = mask.any(axis=(1, 2))
    assert touched.any()
    if tiles > 1 and box == BOXES[0]:
        assert not touched.all()  # it misses some tiles: the sentence above says something
    if family in WITH_OVERVIEW:
        side = picture.cell[0]
        reach = REDUCE[family](joined(np.repeat(mask[..., None], 3, -1).astype(np.float32), picture.grid), side)
        outside = ~(np.abs(reach).max(axis=-1) > 0)
        assert 0 < outside.mean() < 1
        assert not change[tiles][outside].any()
        assert (change[tiles] != 0).any(axis=-1)[reach[..., 0] > 0.99].all()


def test_every_view_shows_the_same_noise(host, model, family):
    """The view of the whole changes by the family's own reduction of the change of the canvas."""
    if family not in WITH_OVERVIEW:
        pytest.skip("one view of each pixel")
    picture = show(host, image(family), region(family, BOXES[0]), 30.0, 5)
    batch = batch_of([picture])
    change = as_canvas(views(model, batch, Schedule()) - clean_views(model, batch), family)
    tiles = picture.grid[0] * picture.grid[1]
    wanted = REDUCE[family](joined(change[:tiles], picture.grid), picture.cell[0])
    np.testing.assert_allclose(change[tiles], wanted, atol=2e-5)
    assert np.abs(change[tiles]).max() > 0.1


def test_variance_is_what_each_view_makes_of_it(host, model, family):
    """Unit noise has its own variance in each cell, and that of the reduction's weights in the view of the whole."""
    grey = Image.new("RGB", SIZES[family], (128, 128, 128))
    picture = show(host, grey, True, 50.0)
    schedule = Schedule("linear", floor=0.98)  # a hundredth of the variance: nothing is clipped
    draws = []
    for number in range(12):
        batch = batch_of([Picture(**{**vars(picture), "noise_id": 1000 * number + 1})])
        draws.append(as_canvas(views(model, batch, schedule) - clean_views(model, batch), family))
    change = np.stack(draws)
    tiles = picture.grid[0] * picture.grid[1]
    if family == "phi3_vision":  # white padding is clipped
        inside = np.asarray(batch.canvas[0, :tiles, ..., 0]) == 128
        variance = change[:, :tiles][:, inside].var()
    else:
        variance = change[:, :tiles].var()
    assert variance == pytest.approx(0.01, rel=0.02)
    if family in WITH_OVERVIEW:
        side = picture.cell[0]
        rows, columns = (axis_weights(family, times, side) for times in picture.grid)
        share = np.outer((rows**2).sum(axis=1), (columns**2).sum(axis=1))
        centre = slice(side // 4, side - side // 4)  # away from Phi's padding
        found = (change[:, tiles, centre, centre] ** 2).mean(axis=(0, 3)) / share[centre, centre]
        assert found.mean() == pytest.approx(0.01, rel=0.03)
        assert share[centre, centre].mean() < 0.6  # a reduction averages noise


def axis_weights(family: str, times: int, side: int) -> np.ndarray:
    """[side, times * side]: the reduction of one axis, read off unit pictures."""
    units = np.eye(times * side, dtype=np.float32)
    if family == "internvl2":
        return np.asarray(Image.fromarray(units).resize((times * side, side), Image.Resampling.BICUBIC))
    values = torch.from_numpy(units)[None, None]
    return torch.nn.functional.interpolate(values, size=(side, times * side), mode="bicubic")[0, 0].numpy()


def test_noise_knows_neither_its_place_nor_its_neighbours(host, model, family):
    """Behind another picture and with room to spare: the same views, and no two cells share their noise."""
    first = show(host, image(family, 1), region(family, BOXES[1]), 20.0, 3)
    second = show(host, image(family, 2), region(family, BOXES[0]), 0.0, 4)
    alone = views(model, batch_of([second]), Schedule())
    both = views(model, batch_of([first, second], first.cells + second.cells + 2), Schedule())
    np.testing.assert_allclose(both[first.cells : first.cells + second.cells], alone, atol=2e-6)
    unhurt = show(host, image(family, 1), False, 20.0, 3)
    clean = views(model, batch_of([unhurt, second]), Schedule())[: first.cells]
    np.testing.assert_array_equal(clean, clean_views(model, batch_of([unhurt])))
    other = show(host, image(family, 2), True, 0.0, 4)
    noise = views(model, batch_of([other]), Schedule())[: other.grid[0] * other.grid[1]]
    assert len({cell.tobytes() for cell in noise}) == len(noise)
    again = views(model, batch_of([other]), Schedule(), seed=1)[: len(noise)]
    assert not np.array_equal(noise, again)
