"""Qwen2-VL on the host: pictures keep their shape, cut into patches of which 2 x 2 fill one prompt slot.

A canvas cell is the square that fills a slot (28 x 28 pixels in the released models). The prompt is ChatML.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, read_json, resize_mask, resize_picture

NARROWEST = 200  # to 1


class Qwen2VLHost(HostFamily):
    """Canvas, prompt and token counts of a Qwen2-VL checkpoint folder."""

    image_mark = "<|image_pad|>"
    image_field = "image_token_id"
    end_of_answer = "<|im_end|>"

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.image_token = self.config.get("image_token_id", 151655)
        vision = self.config.get("vision_config", {})
        self.side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
        self.cell = (self.side, self.side)
        found = read_json(directory / "preprocessor_config.json", optional=True)
        size = found.get("size") or {}
        self.least = found.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.most = found.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the canvas: whole cells, about the shape and between the limits of the model."""
        if max(width, height) > NARROWEST * min(width, height):
            mend = f"At most {NARROWEST} to 1"
            raise UserError("the picture is too narrow", field="size", value=(width, height), mend=mend)
        side = self.side
        rows, columns = round(height / side), round(width / side)
        pixels = rows * columns * side * side
        if pixels > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows = max(1, math.floor(height / shrink / side))
            columns = max(1, math.floor(width / shrink / side))
        elif pixels < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
        return columns * side, rows * side

    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(resize_picture(image, self.size(*image.size), Image.Resampling.BICUBIC))

    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        return resize_mask(mask, self.size(mask.shape[1], mask.shape[0]))

    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        return canvas.shape[0] * canvas.shape[1] // self.side**2

    def conversation(self, question: str, images: int) -> str:
        pictures = f"<|vision_start|>{self.image_mark}<|vision_end|>" * images
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"
        )
