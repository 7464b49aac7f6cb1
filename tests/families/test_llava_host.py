"""LLaVA on the host: canvases as transformers' processor makes them, masks resized alike, prompts and answers."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import GOLDEN, SLOTS, tiny_model, tiny_values, write_folder
from tokenizers import Tokenizer, models
from transformers import CLIPImageProcessorPil

from csp_jax.errors import UserError
from csp_jax.families.interface import open_image
from csp_jax.families.llava import LlavaHost
from csp_jax.families.registry import open_family
from csp_jax.perturb import to_canvas
from csp_jax.world.config import WorldConfig
from csp_jax.world.tokenizer import build_tokenizer

LLAVA15 = GOLDEN / "llava15"


@pytest.fixture(scope="module")
def llava15(tmp_path_factory: pytest.TempPathFactory) -> LlavaHost:
    """The golden checkpoint's host side, with a tokenizer that knows the image mark only."""
    folder = tmp_path_factory.mktemp("llava15")
    shutil.copyfile(LLAVA15 / "config.json", folder / "config.json")
    Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 300}, "<unk>")).save(str(folder / "tokenizer.json"))
    family = open_family(folder)
    assert isinstance(family, LlavaHost)
    return family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer(WorldConfig(statistics_scenes=100), scenes=20, vocab_size=400)
    return write_folder(tmp_path_factory.mktemp("tiny"), tiny_values(vocab_size=400), tokenizer)


@pytest.fixture(scope="module")
def family(folder: Path) -> LlavaHost:
    return LlavaHost(folder)


@pytest.mark.parametrize("name", ["px0", "px1"])
def test_pixel_values_are_the_golden_ones(llava15, name):
    golden = np.load(LLAVA15 / f"{name}.npz")
    canvas = llava15.canvas(Image.fromarray(golden["image_u8"]))
    assert (canvas.dtype, canvas.shape) == (np.uint8, (336, 336, 3))
    # any model of the family normalizes alike
    values = np.asarray(tiny_model().normalize(to_canvas(jnp.asarray(canvas))))
    np.testing.assert_allclose(values, golden["pixel_values"][0].transpose(1, 2, 0), atol=2e-6)


@pytest.mark.parametrize("size", [(28, 28), (29, 57), (100, 31), (336, 336), (13, 40), (500, 499)])
def test_canvas_of_any_size_is_what_transformers_makes(family, size):
    picture = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    wanted = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    canvas = family.canvas(Image.fromarray(picture))
    np.testing.assert_array_equal(canvas, wanted[0].transpose(1, 2, 0))


def test_a_mask_is_resized_as_its_picture_is(family):
    """A white rectangle on black: where the resized picture is more white than black, there the mask is."""
    mask = np.zeros((90, 140), bool)
    mask[20:70, 33:101] = True
    picture = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    canvas = family.canvas(Image.fromarray(picture))[..., 0]
    found = family.canvas_mask(mask)
    assert (found.dtype, found.shape) == (np.bool_, (28, 28))
    assert 0 < found.sum() < found.size
    clear = (canvas < 100) | (canvas > 155)
    np.testing.assert_array_equal(found[clear], canvas[clear] > 127)
    whole = np.random.default_rng(0).random((28, 28)) < 0.5
    np.testing.assert_array_equal(family.canvas_mask(whole), whole)


def test_a_sliver_is_refused(family):
    with pytest.raises(UserError, match="too narrow"):
        family.canvas(Image.new("RGB", (4000, 3)))


def test_prompt_and_answer_tokens(family):
    encoded = family.encode("Is there a cat in the image?", "yes", (SLOTS,))
    tokens = list(encoded.tokens)
    text = family.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.replace("<image>" * SLOTS, "<image>") == (
        "<s>USER: <image>\nIs there a cat in the image? ASSISTANT: yes</s>"
    )
    assert tokens.count(family.image_token) == SLOTS
    assert encoded.answer == tuple(i >= len(tokens) - 2 for i in range(len(tokens)))
    asked = family.encode("Is there a cat in the image?", None, (SLOTS,))
    assert asked.tokens == tuple(tokens[:-2])
    assert not any(asked.answer)


def test_every_percentage_is_marked_whole(family):
    for percent in (0, 7, 73, 100):
        encoded = family.encode("How sure?", f"{percent}%", (SLOTS,))
        answer = [t for t, mark in zip(encoded.tokens, encoded.answer) if mark]
        assert family.tokenizer.decode(answer, skip_special_tokens=False).strip() == f"{percent}%</s>"
        assert len(answer) == len(str(percent)) + 3  # a space, digits, the sign, the end


def test_an_image_mark_in_a_question_is_refused(family):
    with pytest.raises(UserError, match="image mark"):
        family.encode("What does <image> mean?", "nothing", (SLOTS,))


def damaged(folder: Path, target: Path, **values: object) -> Path:
    shutil.copytree(folder, target)
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_mistakes_in_a_folder_are_named(folder, tmp_path):
    other = damaged(folder, tmp_path / "a", model_type="blip")
    with pytest.raises(UserError, match="no such model family") as caught:
        open_family(other)
    assert (caught.value.file, caught.value.value) == (other / "config.json", "blip")
    other = damaged(folder, tmp_path / "b", image_token_index=9)
    with pytest.raises(UserError, match="writes <image> as 3") as caught:
        open_family(other)
    assert caught.value.field == "image_token_index"
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_family(other)
    assert caught.value.file == other / "tokenizer.json"
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        open_family(other)
    with pytest.raises(UserError, match=r"no config\.json"):
        open_family(tmp_path / "nowhere")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def test_pictures_are_opened_upright_and_on_white():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide = Image.new("RGB", (20, 10))
    assert open_image(encoded(wide, "JPEG", exif=exif)).size == (10, 20)
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.all(np.asarray(open_image(encoded(clear, "PNG"))) == 255)
    grey = np.asarray(open_image(encoded(Image.new("L", (4, 4), 77), "PNG")))
    assert grey.shape == (4, 4, 3)
    assert np.all(grey == 77)


@pytest.mark.parametrize("cut", [0, 40, -500])
def test_a_broken_picture_is_named(cut):
    data = encoded(Image.effect_noise((64, 64), 50), "PNG")[:cut]
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_image(data, "photo 7")
    assert caught.value.file == "photo 7"
