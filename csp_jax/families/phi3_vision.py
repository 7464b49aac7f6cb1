"""Phi-3.5-vision on the host: crops of 336 pixels side by side, white above and below, and one view of the whole.

The canvas is the picture at the largest width (height, if it stands upright) that the allowed crops give, padded
with white to whole crops. The view of the whole is a linear map of the canvas, so the device makes it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.families.interface import IMAGE_SLOT, HostFamily, read_json, resize_picture

SIDE = 336
ROW = 12  # prompt slots in a row of a crop, before the row's separator
PICTURE = re.compile(r"<\|image_\d+\|>")


class Phi3VisionHost(HostFamily):
    """Canvas, prompt and token counts of a Phi-3.5-vision checkpoint folder."""

    end_of_answer = "<|end|>"
    cell = (SIDE, SIDE)

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.crops = read_json(directory / "preprocessor_config.json", optional=True).get("num_crops", 4)
        self.short = self.config.get("original_max_position_embeddings", 4096)

    def check_words(self) -> None:
        if self.tokenizer.token_to_id(self.end_of_answer) is None:
            mend = "config.json and the tokenizer's files must be of one checkpoint"
            raise UserError(f"the tokenizer has no {self.end_of_answer}", file=self.directory, mend=mend)

    def _fit(self, picture: Image.Image, colour: str | int) -> Image.Image:
        """Resized to the width of the crops and padded to their height. Upright pictures are turned for it and back:
        turning first or last is not the same to the last bit."""
        if picture.width < picture.height:
            return self._fit(picture.transpose(Image.Transpose.TRANSPOSE), colour).transpose(Image.Transpose.TRANSPOSE)
        ratio = picture.width / picture.height
        scale = 1
        while (scale + 1) * math.ceil((scale + 1) / ratio) <= self.crops:
            scale += 1
        width, height = scale * SIDE, int(scale * SIDE / ratio)
        if height == 0:
            raise UserError("the picture is too narrow", field="size", value=picture.size, mend=f"At most {width} to 1")
        picture = resize_picture(picture, (width, height), Image.Resampling.BILINEAR)
        whole = math.ceil(height / SIDE) * SIDE
        ground = Image.new(picture.mode, (width, whole), colour)
        ground.paste(picture, (0, (whole - height) // 2))
        return ground

    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(self._fit(image, "white"))

    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        return np.asarray(self._fit(Image.fromarray(mask.astype(np.uint8) * 255), 0)) >= 128

    def overview(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.zeros((SIDE, SIDE, 3), np.uint8)

    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        rows, columns = canvas.shape[0] // SIDE, canvas.shape[1] // SIDE
        return rows * ROW * (columns * ROW + 1) + 1 + ROW * (ROW + 1)

    def conversation(self, question: str, images: int) -> str:
        if PICTURE.search(question):
            raise UserError("the text holds an image mark of its own", value=question[:80], mend="Remove it")
        pictures = "".join(f"<|image_{number + 1}|>\n" for number in range(images))
        return f"<|user|>\n{pictures}{question}<|end|>\n<|assistant|>\n"

    def pieces(self, text: str) -> tuple[list[int], list[int]]:
        """The text between pictures is tokenized piece by piece, each with its own beginning-of-text token."""
        tokens: list[int] = []
        ends: list[int] = []
        start = 0
        for picture in [*PICTURE.finditer(text), None]:
            stop = len(text) if picture is None else picture.start()
            encoding = self.tokenizer.encode(text[start:stop])
            tokens += encoding.ids
            ends += [start + end for _, end in encoding.offsets]
            if picture is not None:
                start = picture.end()
                tokens.append(IMAGE_SLOT)
                ends.append(start)
        return tokens, ends

    def regime(self, length: int, *, train: bool = False) -> float:
        return float(length > self.short)
