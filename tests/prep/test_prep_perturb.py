"""Noise made offline against the noise of training (csp_jax.perturb), against closed forms, and against scipy."""

from __future__ import annotations

import io
import math
from pathlib import Path

import jax
import numpy as np
import prep_samples
import pytest
import scipy.stats
import torch
from PIL import Image
from prep_runs import config_of, prepared, records, rejects, tree

import csp_jax.perturb as on_device
from csp_jax.errors import UserError
from csp_jax.families.interface import open_image
from csp_jax.families.llava import LlavaHost
from csp_jax.records import decode_mask
from data_prep.config import CanvasConfig, PerturbConfig, load_prep_config
from data_prep.perturb import Schedule, bury, iterate, jump, on_canvas, seeded, to_bytes, to_signed
from data_prep.run import prepare
from data_prep.verify import verify

NAMES = ("constant", "linear", "ddpm", "cosine")
PERCENTS = np.arange(101)


class Canvas(LlavaHost):
    """LLaVA's resizing without a checkpoint."""

    def __init__(self, size: int):
        self.size = size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t_max", [1, 7, 500, 1000])
def test_schedules_are_those_of_training(name, t_max):
    mine, other = Schedule(name, t_max, 0.02, 0.01), on_device.Schedule(name, t_max, 0.02, 0.01)
    expected = np.array([float(other.alpha_bar(np.float32(percent))) for percent in PERCENTS])
    np.testing.assert_allclose([mine.alpha_bar(int(percent)) for percent in PERCENTS], expected, rtol=3e-4, atol=1e-6)
    if name != "linear":
        steps = [int(other.steps(np.float32(percent))) for percent in PERCENTS]
        assert [mine.steps(int(percent)) for percent in PERCENTS] == steps


@pytest.mark.parametrize("name", ["constant", "ddpm", "cosine"])
def test_steps_multiply_to_what_is_left(name):
    schedule = Schedule(name, 200, 0.01)
    for percent in (0, 1, 37, 99, 100):
        gammas = schedule.gammas(percent)
        assert len(gammas) == schedule.steps(percent)
        assert math.prod(1 - gamma for gamma in gammas) == pytest.approx(
            schedule.alpha_bar(percent), rel=1e-9, abs=1e-12
        )


def test_the_linear_schedule_has_no_steps():
    with pytest.raises(ValueError, match="no steps"):
        Schedule("linear").gammas(50)
    with pytest.raises(ValueError, match="no steps to iterate"):
        PerturbConfig(mode="materialized", schedule="linear")


@pytest.mark.parametrize("name", ["constant", "ddpm", "cosine"])
@pytest.mark.parametrize("percent", [0, 40, 98])
def test_iterating_is_the_closed_form_with_the_noises_put_together(name, percent):
    """v_T = sqrt(alpha_bar) v_0 + sum over t of sqrt(gamma_t) prod over s > t of sqrt(1 - gamma_s) noise_t."""
    schedule = Schedule(name, 60, 0.03)
    gammas = schedule.gammas(percent)
    values = torch.linspace(-1, 1, 300).reshape(100, 3)
    found = iterate(values, gammas, torch.Generator().manual_seed(5))
    replay = torch.Generator().manual_seed(5)
    combined = torch.zeros_like(values, dtype=torch.float64)
    for gamma in gammas:
        combined = math.sqrt(1 - gamma) * combined + math.sqrt(gamma) * torch.empty_like(values).normal_(
            generator=replay
        )
    alpha_bar = schedule.alpha_bar(percent)
    noise = combined / math.sqrt(1 - alpha_bar)
    torch.testing.assert_close(found, jump(values.double(), alpha_bar, noise).float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["iterate", "closed"])
@pytest.mark.parametrize("percent", [0, 30, 80])
def test_what_is_left_is_normal_with_the_design_s_mean_and_variance(method, percent):
    schedule = Schedule("constant", 120, 0.02)
    alpha_bar = schedule.alpha_bar(percent)
    values = torch.linspace(-0.9, 0.9, 60_000)
    generator = torch.Generator().manual_seed(1)
    if method == "iterate":
        noised = iterate(values, schedule.gammas(percent), generator)
    else:
        noised = jump(values, alpha_bar, torch.randn(values.shape, generator=generator))
    rest = ((noised - math.sqrt(alpha_bar) * values) / math.sqrt(1 - alpha_bar)).numpy()
    assert scipy.stats.kstest(rest, "norm").pvalue > 0.01
    assert abs(np.corrcoef(rest, values)[0, 1]) < 0.02


def test_bytes_come_back_exactly():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_bytes(to_signed(every)), every)
    np.testing.assert_allclose(to_signed(every).numpy(), np.asarray(on_device.to_canvas(every)), atol=1e-7)
    np.testing.assert_array_equal(to_bytes(torch.tensor([-3.0, -1.0, 1.0, 9.0])), [0, 0, 255, 255])


# --- the same picture on both ways, in `model` space ------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 72), (72, 96), (64, 64), (61, 97), (640, 427)])
def test_the_canvas_is_that_of_training(size):
    picture = np.asarray(prep_samples.picture(1, size))
    mask = np.zeros(picture.shape[:2], bool)
    mask[5:40, 11:50] = True
    small, moved = on_canvas(picture, mask, CanvasConfig(size=48))
    family = Canvas(48)
    np.testing.assert_array_equal(small, family.canvas(Image.fromarray(picture)))
    np.testing.assert_array_equal(moved, family.canvas_mask(mask))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("percent", [0, 35, 70, 99, 100])
def test_materialized_and_on_device_noise_are_equal_in_model_space(name, percent, monkeypatch):
    """One record's picture both ways: noised offline and opened by training, or noised by training on the device.

    Both get the same Gaussian numbers; half a grey level is lost to the bytes of the stored picture.
    """
    size, t_max = 56, 80
    picture = np.asarray(prep_samples.picture(4, (97, 75)))
    region = np.zeros(picture.shape[:2], bool)
    region[16:56, 24:64] = prep_samples.disc()[16:56, 24:64]
    small, mask = on_canvas(picture, region, CanvasConfig(size=size))
    offline = bury(small, mask, percent, Schedule(name, t_max), seeded(0, "q", percent), "closed")
    family = Canvas(size)
    shown = family.canvas(open_image(encoded(offline)))

    noise = np.zeros((size, size, 3), np.float32)
    drawn = torch.empty(int(mask.sum()), 3).normal_(generator=seeded(0, "q", percent))
    noise[mask] = drawn.numpy()
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: noise)
    canvas, canvas_mask = family.canvas(Image.fromarray(picture)), family.canvas_mask(region)
    device = on_device.perturb(
        canvas[None, None],
        canvas_mask[None, None],
        np.full((1, 1), percent, np.float32),
        np.zeros((1, 1), np.uint32),
        jax.random.key(0),
        on_device.Schedule(name, t_max),
    )[0, 0]
    gap = np.abs(np.asarray(device) - np.asarray(on_device.to_canvas(shown)))
    assert gap.max() <= 1 / 255 + 2e-4
    np.testing.assert_array_equal(np.asarray(device)[~mask], np.asarray(on_device.to_canvas(shown))[~mask])


@pytest.mark.parametrize("percent", [0, 50])
def test_materialized_and_on_device_noise_have_one_distribution_without_sharing_numbers(percent):
    size = 64
    grey = np.full((size, size, 3), 150, np.uint8)
    mask = np.ones((size, size), bool)
    schedule = {"name": "constant", "t_max": 100, "noise_gamma": 0.005}
    offline = bury(grey, mask, percent, Schedule(**schedule), seeded(0, "q", percent), "iterate")
    device = on_device.perturb(
        grey[None, None],
        mask[None, None],
        np.full((1, 1), percent, np.float32),
        np.zeros((1, 1), np.uint32),
        jax.random.key(3),
        on_device.Schedule(**schedule),
    )
    first, second = np.asarray(on_device.to_canvas(offline)).ravel(), np.asarray(device).ravel()
    second = np.round((second + 1) * 127.5) / 127.5 - 1
    assert scipy.stats.ks_2samp(first, second).pvalue > 0.01


def encoded(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_original_space_is_averaged_by_the_resize():
    """[A] noises before the resize; a picture of four times the canvas loses most of its noise on the way."""
    picture = np.full((256, 256, 3), 128, np.uint8)
    mask = np.ones((256, 256), bool)
    noised = bury(picture, mask, 90, Schedule("constant", 100, 0.01), seeded(0, "q", 90))
    before = np.asarray(noised, float).std()
    after = np.asarray(Canvas(64).canvas(Image.fromarray(noised)), float).std()
    assert 0.15 < after / before < 0.4


# --- the stage --------------------------------------------------------------------------------------------------


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def materialized(folder: Path, **settings: object):
    perturb = {"mode": "materialized", "levels": [0, 50, 100], "t_max": 50, "noise_gamma": 0.05, **settings}
    return prepared("folder", folder, localize={"nothing": "keep"}, perturb=perturb)


def test_one_picture_for_every_label_and_only_the_mask_changes(tmp_path):
    done = materialized(tmp_path)
    mug, cup = records(done.directory)
    assert [r["reason"] for r in rejects(done.directory)] == ["nothing_to_perturb"]
    assert (done.totals["questions"], done.totals["items"]) == (2, 6)
    for record in (mug, cup):
        original = pixels(record.images[0])
        mask = decode_mask(record.regions[0].mask, *original.shape[:2])
        assert [item.confidence for item in record.items] == [0, 50, 100]
        assert [item.id.rpartition("@")[2] for item in record.items] == ["0", "50", "100"]
        shown = [pixels(item.perturbed_image) for item in record.items]
        for picture in shown:
            np.testing.assert_array_equal(picture[~mask], original[~mask])
        np.testing.assert_array_equal(shown[2], original)
        errors = [np.abs(picture[mask].astype(float) - original[mask]).mean() for picture in shown]
        assert errors[0] > errors[1] > 20
    found = verify(done.directory)
    assert found["perturbed_bytes"] == sum(len(item.perturbed_image) for r in (mug, cup) for item in r.items)


def test_box_and_global_regions(tmp_path):
    mug, _ = records(materialized(tmp_path / "box", region="box").directory)
    changed = (pixels(mug.items[0].perturbed_image) != pixels(mug.images[0])).any(axis=-1)
    x0, y0, x1, y1 = prep_samples.BOX
    assert changed[y0:y1, x0:x1].mean() > 0.95
    assert changed.sum() == changed[y0:y1, x0:x1].sum()
    done = materialized(tmp_path / "global", region="global")
    stored = records(done.directory)
    assert len(stored) == 3
    assert (pixels(stored[2].items[0].perturbed_image) != pixels(stored[2].images[0])).any(axis=-1).mean() > 0.95


def test_levels_are_drawn_for_each_question_and_noise_is_reproducible(tmp_path):
    settings = {"levels": list(range(101)), "draw": 3}
    done = materialized(tmp_path / "a", **settings)
    drawn = [[item.confidence for item in record.items] for record in records(done.directory)]
    assert all(len(set(levels)) == 3 for levels in drawn)
    assert drawn[0] != drawn[1]
    again = materialized(tmp_path / "b", **settings)
    assert tree(done.directory) == tree(again.directory)
    pictures = [item.perturbed_image for record in records(done.directory) for item in record.items]
    assert len(set(pictures)) == len(pictures)
    file = tmp_path / "draw.yaml"
    file.write_text("dataset: x\nout: x\nsource: {name: folder, root: x}\nperturb: {levels: [1], draw: 2}\n")
    with pytest.raises(UserError, match="more than there are"):
        load_prep_config(file)


def test_model_space_and_jpeg(tmp_path):
    done = materialized(tmp_path, space="model", canvas={"size": 40}, encoding="jpeg", quality=100)
    mug, _ = records(done.directory)
    assert {pixels(item.perturbed_image).shape for item in mug.items} == {(40, 40, 3)}
    assert mug.items[0].perturbed_image.startswith(b"\xff\xd8")
    clear = Canvas(40).canvas(open_image(mug.images[0])).astype(int)
    assert np.abs(pixels(mug.items[2].perturbed_image).astype(int) - clear).mean() < 2
    assert mug.regions[0].box == tuple(map(float, prep_samples.BOX))


def test_other_noise_is_another_run(tmp_path):
    materialized(tmp_path)
    with pytest.raises(UserError, match="another run wrote"):
        materialized(tmp_path, t_max=51)
    config = config_of("folder", tmp_path / "folder", tmp_path / "other")
    assert prepare(config).totals["items"] == 3
