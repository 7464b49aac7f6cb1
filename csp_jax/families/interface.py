"""What the host knows of a family: pictures to canvases, words to tokens. Numpy only, for light workers."""

from __future__ import annotations

import abc
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from csp_jax.errors import UserError
from csp_jax.families.tokenizer_files import open_tokenizer

IMAGE_MARK = "<image>"
IMAGE_SLOT = -1  # fills a picture's slots in families whose configuration names no token for it


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation's tokens, image slots expanded; `answer` marks the tokens of the answer."""

    tokens: tuple[int, ...]
    answer: tuple[bool, ...]


class HostFamily(abc.ABC):
    """One family on the host. Implementations read their numbers from the checkpoint's folder."""

    image_mark: str = IMAGE_MARK  # the token that stands for a picture in the prompt's text
    image_token: int = IMAGE_SLOT  # what fills a picture's slots
    image_field: str | None = None  # where `config.json` names it
    cell: tuple[int, int]  # rows and columns of the blocks that a canvas is cut into
    end_of_answer: str
    before_answer: str = ""  # between a prompt and its answer

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, opened when it is first used."""
        return open_tokenizer(self.directory)

    @abc.abstractmethod
    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        """The resized picture that noise is laid on; a whole number of cells each way."""

    @abc.abstractmethod
    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        """A mask of the original picture, resized as the picture is."""

    def overview(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"] | None:
        """A cell that follows the canvas's: the clean view of the whole picture that the family makes from the
        original, or zeros where the device makes it from the canvas; None where the family has no such view."""
        return None

    @abc.abstractmethod
    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        """Prompt slots that a canvas fills."""

    @abc.abstractmethod
    def conversation(self, question: str, images: int) -> str:
        """The prompt text up to where the answer begins, with one image mark per picture."""

    def regime(self, length: int, *, train: bool = False) -> float:
        """What a sequence's length chooses in the rotary frequencies, in training or in evaluation.

        Sequences that share a prompt's keys are computed under the regime of the longest: they should have one.
        """
        return 0.0

    def check_words(self) -> None:
        """UserError where tokenizer and configuration are not of one checkpoint."""
        mark = self.tokenizer.token_to_id(self.image_mark)
        if mark is None or self.image_token not in (IMAGE_SLOT, mark):
            raise UserError(
                f"the tokenizer writes {self.image_mark} as {mark}",
                file=self.directory / "config.json",
                field=self.image_field,
                value=None if self.image_token == IMAGE_SLOT else self.image_token,
                mend="config.json and the tokenizer's files must be of one checkpoint",
            )

    def pieces(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a text, and the places in the text where they end; each picture is one `image_token`."""
        encoding = self.tokenizer.encode(text)
        mark = self.tokenizer.token_to_id(self.image_mark)
        tokens = [self.image_token if token == mark else token for token in encoding.ids]
        return tokens, [end for _, end in encoding.offsets]

    def encode(self, question: str, answer: str | None, slots: tuple[int, ...]) -> Encoded:
        """Tokens of a question about pictures (`slots` of each) and, if given, of its answer and end mark."""
        prompt = self.conversation(question, len(slots))
        text = prompt if answer is None else f"{prompt}{self.before_answer}{answer}{self.end_of_answer}"
        tokens, ends = self.pieces(text)
        marks = [end > len(prompt) for end in ends]
        pictures = [place for place, token in enumerate(tokens) if token == self.image_token]
        if len(pictures) > len(slots):
            raise UserError("the text holds an image mark of its own", value=question[:80], mend="Remove it")
        if len(pictures) < len(slots):
            raise ValueError(f"{len(pictures)} image slots in the prompt for {len(slots)} pictures")
        for place, count in reversed(list(zip(pictures, slots))):
            tokens[place : place + 1] = tokens[place : place + 1] * count
            marks[place : place + 1] = marks[place : place + 1] * count
        return Encoded(tuple(tokens), tuple(marks))


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON mapping; an optional file that is not there is an empty one."""
    if optional and not file.exists():
        return {}
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", file=file, mend="Check the checkpoint's folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error})", file=file, mend="Download the file again") from None
    if not isinstance(values, dict):
        raise UserError("must hold fields", file=file, mend="Download the file again")
    return values


def resize_picture(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """A picture at `size` (width, height)."""
    return image if image.size == size else image.resize(size, resample)


def resize_mask(mask: Bool[np.ndarray, "height width"], size: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """A mask at `size` (width, height): where its resized picture, white on black, is more white than black."""
    if mask.shape == (size[1], size[0]):
        return mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) >= 128


def open_image(data: bytes | Path, name: str = "image") -> Image.Image:
    """A picture as RGB, upright (EXIF), first frame, transparency on white; an unreadable one is an error."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = picture.point(lambda value: value / 256).convert("L")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError("there is no such image", file=name, mend="Check the path") from None
    except Exception as error:  # decoders answer damaged files with nearly anything, SyntaxError among it
        raise UserError(f"the image cannot be read ({error})", file=name, mend="Replace the file") from None
