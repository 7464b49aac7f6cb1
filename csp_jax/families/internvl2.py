"""InternVL2 on the host: 1 to 12 tiles in the grid nearest to the picture's shape, and a thumbnail of the whole.

The canvas is the picture stretched over the grid; the thumbnail is made from the original picture, as the family
does, and follows the tiles as the picture's overview.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from csp_jax.families.interface import HostFamily, resize_mask, resize_picture

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


class InternVL2Host(HostFamily):
    """Canvas, prompt and token counts of an InternVL2 checkpoint folder."""

    image_mark = "<IMG_CONTEXT>"
    end_of_answer = "<|im_end|>"

    def __init__(self, directory: Path):
        super().__init__(directory)
        config, vision = self.config, self.config["vision_config"]
        self.side = config.get("force_image_size") or vision["image_size"]
        self.cell = (self.side, self.side)
        self.slots = int((self.side // vision["patch_size"]) ** 2 * config.get("downsample_ratio", 0.5) ** 2)
        self.use_thumbnail = config.get("use_thumbnail", True)
        most = config.get("max_dynamic_patch", 12) if config.get("dynamic_image_size", True) else 1
        self.grids = grids(config.get("min_dynamic_patch", 1), most)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles: the nearest shape; of shapes alike the larger, if the picture fills half of it."""
        best, nearest = (1, 1), float("inf")
        for columns, rows in self.grids:
            distance = abs(width / height - columns / rows)
            large_enough = width * height > 0.5 * self.side**2 * columns * rows
            if distance < nearest or (distance == nearest and large_enough):
                best, nearest = (columns, rows), distance
        return best

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the canvas."""
        columns, rows = self.grid(width, height)
        return columns * self.side, rows * self.side

    def canvas(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(resize_picture(image, self.size(*image.size), Image.Resampling.BICUBIC))

    def canvas_mask(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "rows columns"]:
        return resize_mask(mask, self.size(mask.shape[1], mask.shape[0]))

    def overview(self, image: Image.Image) -> UInt8[np.ndarray, "rows columns 3"] | None:
        if not self.use_thumbnail or self.grid(*image.size) == (1, 1):
            return None
        return np.asarray(resize_picture(image, (self.side, self.side), Image.Resampling.BICUBIC))

    def image_tokens(self, canvas: UInt8[np.ndarray, "rows columns 3"]) -> int:
        tiles = canvas.shape[0] * canvas.shape[1] // self.side**2
        return (tiles + (self.use_thumbnail and tiles > 1)) * self.slots

    def conversation(self, question: str, images: int) -> str:
        picture = f"<img>{self.image_mark}</img>\n"
        names = [f"Image-{number + 1}: " if images > 1 else "" for number in range(images)]
        pictures = "".join(f"{name}{picture}" for name in names)
        return (
            f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n{pictures}{question}<|im_end|>"
            "<|im_start|>assistant\n"
        )

    def regime(self, length: int, *, train: bool = False) -> float:
        text = self.config["llm_config"]
        scaling = text.get("rope_scaling") or {}
        return float(scaling.get("type") == "dynamic" and length > text.get("max_position_embeddings", 2048))


def grids(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) of all grids of `least` to `most` tiles, fewer tiles first."""
    found = {
        (columns, rows)
        for tiles in range(least, most + 1)
        for columns in range(1, tiles + 1)
        for rows in range(1, tiles + 1)
        if least <= columns * rows <= most
    }
    return sorted(found, key=lambda grid: grid[0] * grid[1])
