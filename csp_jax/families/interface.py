"""What the host knows of a family: pictures to canvases, words to tokens. Numpy only, for light workers."""

from __future__ import annotations

import abc
import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer

from csp_jax.errors import UserError

IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation's tokens, image slots expanded; `answer` marks the tokens of the answer."""

    tokens: tuple[int, ...]
    answer: tuple[bool, ...]


class HostFamily(abc.ABC):
    """One family on the host. Implementations read their numbers from the checkpoint's folder."""

    tokenizer: Tokenizer
    image_token: int
    end_of_answer: str

    @abc.abstractmethod
    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        """The resized picture that noise is laid on."""

    @abc.abstractmethod
    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        """A mask of the original picture, resized as the picture is."""

    @abc.abstractmethod
    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        """Prompt slots that a canvas fills."""

    @abc.abstractmethod
    def conversation(self, question: str, images: int) -> str:
        """The prompt text up to where the answer begins, with one image mark per picture."""

    def encode(self, question: str, answer: str | None, slots: tuple[int, ...]) -> Encoded:
        """Tokens of a question about pictures (`slots` of each) and, if given, of its answer and end mark."""
        prompt = self.conversation(question, len(slots))
        text = prompt if answer is None else f"{prompt} {answer}{self.end_of_answer}"
        encoding = self.tokenizer.encode(text)
        tokens: list[int] = []
        marks: list[bool] = []
        picture = 0
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            count = 1
            if token == self.image_token:
                if picture == len(slots):
                    raise UserError("the text holds an image mark of its own", value=question[:80], mend="Remove it")
                count = slots[picture]
                picture += 1
            tokens.extend([token] * count)
            marks.extend([end > len(prompt)] * count)
        if picture != len(slots):
            raise ValueError(f"{picture} image slots in the prompt for {len(slots)} pictures")
        return Encoded(tuple(tokens), tuple(marks))


def open_image(data: bytes | Path, name: str = "image") -> Image.Image:
    """A picture as RGB, upright (EXIF), first frame, transparency on white; an unreadable one is an error."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError("there is no such image", file=name, mend="Check the path") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image cannot be read ({error})", file=name, mend="Replace the file") from None


def open_tokenizer(directory: Path) -> Tokenizer:
    """`tokenizer.json` of a checkpoint folder."""
    file = directory / "tokenizer.json"
    if not file.exists():
        raise UserError("there is no tokenizer.json", file=directory, mend="Add the checkpoint's tokenizer files")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise UserError(f"cannot be read ({error})", file=file, mend="Download the file again") from None
