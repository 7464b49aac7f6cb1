"""Qwen-VL-Chat on the host: pictures squeezed to one square, 256 prompt slots each, ChatML.

The family's own prompts spell the picture's path inside the slots and overwrite it with features; here the slots
hold the padding mark from the start.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, resize_mask, resize_picture

SLOTS = 256


class QwenVLHost(HostFamily):
    """Canvas, prompt and token counts of a Qwen-VL checkpoint folder."""

    image_mark = "<imgpad>"
    image_field = "visual.image_start_id"
    end_of_answer = "<|im_end|>"

    def __init__(self, directory: Path):
        super().__init__(directory)
        if "visual" not in self.config:
            raise UserError("a Qwen model without pictures", file=directory / "config.json", field="visual")
        visual = self.config["visual"]
        self.image_token = visual.get("image_start_id", 151857) + 2  # <img>, </img>, <imgpad>
        self.side = visual["image_size"]
        self.cell = (self.side, self.side)

    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(resize_picture(image, self.cell, Image.Resampling.BICUBIC))

    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        return resize_mask(mask, self.cell)

    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        return SLOTS

    def conversation(self, question: str, images: int) -> str:
        pictures = "".join(f"Picture {number + 1}: <img>{self.image_mark}</img>\n" for number in range(images))
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    def regime(self, length: int, *, train: bool = False) -> float:
        stretched = self.config.get("use_dynamic_ntk", True) and not train
        return ntk_alpha(length, self.config.get("seq_length", 2048)) if stretched else 1.0


def ntk_alpha(length: int, trained: int) -> float:
    """By how much the rotary base grows for a sequence longer than those that the model was trained on."""
    return max(2.0 ** math.ceil(math.log2(length / trained) + 1) - 1, 1.0)
