"""LLaVA-1.5 on the host: shortest edge resized (bicubic), centre crop, `USER: <image>\\n… ASSISTANT:`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.families.interface import IMAGE_MARK, HostFamily


class LlavaHost(HostFamily):
    """Canvas, prompt and token counts of a LLaVA checkpoint folder."""

    image_field = "image_token_index"
    end_of_answer = "</s>"
    before_answer = " "

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.image_token = self.config.get("image_token_index", self.config.get("image_token_id", 32000))
        vision = self.config["vision_config"]
        self.size = vision["image_size"]
        self.cell = (self.size, self.size)
        self.slots = (self.size // vision["patch_size"]) ** 2

    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(self._fit(image, Image.Resampling.BICUBIC))

    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        if mask.shape == (self.size, self.size):
            return mask
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(self._fit(grey, Image.Resampling.BILINEAR)) >= 128

    def _fit(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Shortest edge to `size`, then the centre."""
        width, height = image.size
        if max(width, height) > 60 * min(width, height):
            raise UserError("the picture is too narrow", field="size", value=image.size, mend="At most 60 to 1")
        shape = (
            (self.size, int(self.size * height / width))
            if width <= height
            else (int(self.size * width / height), self.size)
        )
        if image.size != shape:
            image = image.resize(shape, resample)
        left, top = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        return self.slots

    def conversation(self, question: str, images: int) -> str:
        marks = "".join(f"{IMAGE_MARK}\n" for _ in range(images))
        return f"USER: {marks}{question} ASSISTANT:"
