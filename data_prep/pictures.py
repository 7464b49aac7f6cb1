"""The first stage: read a unit's picture, decode it whole, and sort out what training could not use."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.config import ImagesConfig
from data_prep.unit import Unit

KEPT = ("PNG", "JPEG")  # what a record may hold; everything else is written anew as PNG
MOST_NARROW = 60  # training refuses narrower pictures


class PictureProblem(Exception):
    """Why a picture is not used: a reason to be counted, and details."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(reason)


class DecodeStage:
    """Fills `encoded` and `picture` (RGB, upright, the way training opens it)."""

    name = "decode"

    def __init__(self, config: ImagesConfig, threads: int = 1):
        self.config = config
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(self, batch: list[Unit]) -> None:
        list(self._pool.map(self._decode, [unit for unit in batch if unit.items]))

    def _decode(self, unit: Unit) -> None:
        assert unit.image is not None
        try:
            data = unit.image.read()
        except FileNotFoundError as error:
            unit.reject_all(self.name, "missing_image", str(error.filename or error))
            return
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            unit.reject_all(self.name, "unreadable_image", str(error))
            return
        try:
            unit.encoded, unit.picture = open_picture(data, self.config)
        except PictureProblem as problem:
            unit.reject_all(self.name, problem.reason, problem.detail)


def open_picture(data: bytes, config: ImagesConfig) -> tuple[bytes, UInt8[np.ndarray, "height width 3"]]:
    """(the file to pack, its pixels): RGB, upright (EXIF), first frame, transparency on white.

    The file is kept byte for byte where training can read it; else it becomes a PNG. PictureProblem says why a
    picture is not used.
    """
    if not data:
        raise PictureProblem("unreadable_image", "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `most_pixels`
            picture: Image.Image = Image.open(io.BytesIO(data))
        _check_header(picture, config)
        keep = picture.format in KEPT
        huge = picture.width * picture.height > config.most_pixels
        if huge:
            picture.draft("RGB", _fitting(picture.size, config.most_pixels))
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise PictureProblem("huge_image", str(error)) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "truncated_image" if "truncated" in str(error) else "unreadable_image"
        raise PictureProblem(reason, str(error)) from None
    if picture.mode in ("CMYK", "YCCK") or picture.mode.startswith("I") or picture.mode in ("F", "LAB", "HSV"):
        keep = False
    if huge:
        picture, keep = picture.resize(_fitting(picture.size, config.most_pixels), Image.Resampling.LANCZOS), False
    pixels = np.asarray(_rgb(picture))
    if keep:
        return data, pixels
    return png(pixels), pixels


def _check_header(picture: Image.Image, config: ImagesConfig) -> None:
    """What the header alone tells; before anything is decoded."""
    width, height = picture.size
    size = f"{width} x {height}"
    if width * height > config.most_pixels and config.huge == "reject":
        raise PictureProblem("huge_image", size)
    if min(width, height) < config.least_side:
        raise PictureProblem("tiny_image", size)
    if max(width, height) > MOST_NARROW * min(width, height):
        raise PictureProblem("narrow_image", size)
    if picture.mode in ("L", "LA", "1", "I", "I;16", "F") and config.gray == "reject":
        raise PictureProblem("gray_image", f"mode {picture.mode}")
    if picture.mode == "CMYK" and config.cmyk == "reject":
        raise PictureProblem("cmyk_image", size)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.mode.startswith("I"):  # sixteen bits: the upper eight
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _fitting(size: tuple[int, int], most_pixels: int) -> tuple[int, int]:
    """The size within a limit of pixels, in proportion."""
    scale = min(1.0, (most_pixels / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A PNG file, quickly: noise hardly compresses."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def jpeg(pixels: UInt8[np.ndarray, "height width 3"], quality: int) -> bytes:
    """A JPEG file without colour subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
