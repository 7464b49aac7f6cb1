"""Pictures of every kind that cameras and editors write: the right colours and the right way up, or a clear error."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.families.interface import open_image

RED, BLUE, WHITE = (200, 30, 20), (10, 40, 220), (255, 255, 255)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right; wider than high."""
    picture = Image.new("RGB", (40, 20), RED)
    picture.paste(BLUE, (20, 0, 40, 20))
    return picture.convert(mode)


def assert_colours(picture: Image.Image, left: tuple[int, ...], right: tuple[int, ...], within: int) -> None:
    pixels = np.asarray(picture).astype(int)
    assert picture.mode == "RGB"
    assert np.abs(pixels[4:16, 4:16] - left).max() <= within
    assert np.abs(pixels[4:16, 24:36] - right).max() <= within


PLAIN: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: encoded(halves(), "PNG"),
    "RGB jpeg": lambda: encoded(halves(), "JPEG", quality=95, subsampling=0),
    "CMYK jpeg": lambda: encoded(halves("CMYK"), "JPEG", quality=95),
    "CMYK tiff": lambda: encoded(halves("CMYK"), "TIFF"),
    "palette": lambda: encoded(halves().quantize(4), "PNG"),
    "palette gif": lambda: encoded(halves().quantize(4), "GIF"),
    "webp": lambda: encoded(halves(), "WEBP", lossless=True),
    "animated gif": lambda: encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), WHITE)]),
    "animated webp": lambda: encoded(
        halves(), "WEBP", save_all=True, lossless=True, append_images=[Image.new("RGB", (40, 20), WHITE)]
    ),
    "animated png": lambda: encoded(halves(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 20), WHITE)]),
    "YCbCr": lambda: encoded(halves("YCbCr"), "TIFF"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_colours_are_right_whatever_the_file(kind):
    assert_colours(open_image(PLAIN[kind]()), RED, BLUE, 12)


@pytest.mark.parametrize("turn", range(1, 9))
def test_cameras_are_turned_upright(turn):
    """A picture stored in each of EXIF's eight ways is shown as it was taken."""
    stored = {
        1: lambda p: p,
        2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
        4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
        6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
        7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
        8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
    }[turn](halves())
    exif = Image.Exif()
    exif[0x0112] = turn
    opened = open_image(encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif))
    assert opened.size == (40, 20)
    assert_colours(opened, RED, BLUE, 12)


def test_what_is_transparent_is_white():
    left = halves("RGBA")
    left.putalpha(Image.fromarray(np.repeat(np.repeat([[0, 255]], 20, 0), 20, 1).astype(np.uint8)))
    assert_colours(open_image(encoded(left, "PNG")), WHITE, BLUE, 0)
    palette = halves().quantize(4)
    hidden = palette.getpixel((0, 0))
    assert_colours(open_image(encoded(palette, "PNG", transparency=hidden)), WHITE, BLUE, 12)
    grey = Image.new("LA", (40, 20), (77, 0))
    grey.paste((99, 255), (20, 0, 40, 20))
    assert_colours(open_image(encoded(grey, "PNG")), WHITE, (99,) * 3, 0)


@pytest.mark.parametrize(
    ("picture", "left", "right"),
    [
        (Image.fromarray(np.repeat(np.repeat([[51 * 257, 204 * 257]], 20, 0), 20, 1).astype(np.uint16)), 51, 204),
        (Image.fromarray(np.repeat(np.repeat([[51, 204]], 20, 0), 20, 1).astype(np.uint8)), 51, 204),
        (Image.fromarray(np.repeat(np.repeat([[False, True]], 20, 0), 20, 1)), 0, 255),
    ],
    ids=["16 bits", "8 bits", "1 bit"],
)
def test_grey_of_any_depth(picture, left, right):
    assert_colours(open_image(encoded(picture, "PNG")), (left,) * 3, (right,) * 3, 0)


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000)])
def test_extreme_sizes_are_opened(size):
    assert open_image(encoded(Image.new("RGB", size, RED), "PNG")).size == size


def test_a_picture_that_would_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_image(encoded(halves(), "PNG"), "large.png")
    assert caught.value.file == "large.png"


@pytest.mark.parametrize("cut", [0, 10, 60, -60])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_cut_files_are_named(kind, cut):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_image(encoded(noise, kind)[:cut], "photo 7")
    assert caught.value.file == "photo 7"


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        open_image(b"<svg></svg>", "drawing.svg")
    with pytest.raises(UserError, match="no such image"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)


def verdict(data: bytes) -> str:
    """The mode of the picture, or the file that the error names."""
    try:
        return open_image(data, "photo").mode
    except UserError as error:
        return str(error.file)


@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_damage_anywhere_is_a_picture_or_a_clear_error():
    """Random bytes and cuts: whatever a decoder makes of them, nothing else comes out."""
    generator = np.random.default_rng(4)
    files = [PLAIN[kind]() for kind in ("RGB", "CMYK jpeg", "animated png", "animated gif", "webp")]
    verdicts = []
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(256)
        cut = len(data) if number % 3 else int(generator.integers(len(data)))
        verdicts.append(verdict(bytes(data[:cut])))
    assert set(verdicts) == {"RGB", "photo"}
    assert 100 < verdicts.count("photo") < 600
