"""Burying key objects under diffusion noise in torch: the materialized pictures of [A] 3.2.

`v_t ~ N(sqrt(1 - gamma_t) v_{t-1}, gamma_t I)` for `t = 1 .. T_c`, `T_c = floor(T_max (1 - c / 100))`, then
`m * v_T + (1 - m) * v_0`, clipped to [-1, 1]. Only the pixels under the mask are iterated: no other is used. The
closed form `v_T = sqrt(alpha_bar) v_0 + sqrt(1 - alpha_bar) noise` is the same process in one step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from csp_jax.records import Item
from data_prep.config import CanvasConfig, PerturbConfig
from data_prep.pictures import jpeg, png
from data_prep.unit import Unit

Pixels = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "height width"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much noise a confidence means; the names and numbers are those of training's `noise` section.

    `constant`: gamma_t = noise_gamma. `ddpm`: linearly growing betas 1e-4..0.02 (Ho et al. 2020). `cosine`: Nichol
    and Dhariwal 2021. `linear`: alpha_bar falls linearly from 1 at 100% to `floor` at 0%; it has no steps.
    """

    name: Literal["constant", "linear", "ddpm", "cosine"] = "constant"
    t_max: int = 500
    noise_gamma: float = 0.01
    floor: float = 0.0066

    def steps(self, confidence: int) -> int:
        """`T_c`, exact."""
        return self.t_max * (100 - confidence) // 100

    def alpha_bar(self, confidence: int) -> float:
        """The share of signal variance that a confidence in percent leaves."""
        if confidence >= 100:
            return 1.0
        if self.name == "linear":
            return 1.0 - (1 - self.floor) * (100 - confidence) / 100
        steps = self.steps(confidence)
        if self.name == "constant":
            return math.exp(steps * math.log1p(-self.noise_gamma))
        if self.name == "cosine":
            return min(1.0, _cosine(steps / self.t_max) / _cosine(0.0))
        return math.prod(1.0 - beta for beta in self._betas()[:steps])

    def gammas(self, confidence: int) -> list[float]:
        """gamma_t of the steps t = 1 .. T_c."""
        steps = self.steps(confidence)
        if self.name == "constant":
            return [self.noise_gamma] * steps
        if self.name == "ddpm":
            return self._betas()[:steps]
        if self.name == "cosine":
            left = [_cosine(t / self.t_max) for t in range(steps + 1)]
            return [1.0 - later / earlier for earlier, later in itertools.pairwise(left)]
        raise ValueError("a schedule that is linear in alpha_bar has no steps")

    def _betas(self) -> list[float]:
        return torch.linspace(1e-4, 0.02, self.t_max, dtype=torch.float64).tolist()


def _cosine(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def to_signed(pixels: UInt8[np.ndarray, "..."]) -> Float[torch.Tensor, "..."]:
    """Bytes -> [-1, 1]."""
    return (torch.from_numpy(np.ascontiguousarray(pixels)).float() * 2.0 - 255.0) * (1 / 255.0)


def to_bytes(values: Float[torch.Tensor, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] -> bytes, rounded; what lies outside is clipped."""
    return ((values.clamp(-1.0, 1.0) * 255.0 + 255.0) / 2.0).round().to(torch.uint8).numpy()


def iterate(
    values: Float[torch.Tensor, "..."], gammas: list[float], generator: torch.Generator | None
) -> Float[torch.Tensor, "..."]:
    """`v_T` by T steps of `v_t = sqrt(1 - gamma_t) v_{t-1} + sqrt(gamma_t) noise_t`, as [A] writes it."""
    current = values.clone()
    noise = torch.empty_like(current)
    for gamma in gammas:
        noise.normal_(generator=generator)
        current.mul_(math.sqrt(1.0 - gamma)).add_(noise, alpha=math.sqrt(gamma))
    return current


def jump(
    values: Float[torch.Tensor, "..."], alpha_bar: float, noise: Float[torch.Tensor, "..."]
) -> Float[torch.Tensor, "..."]:
    """`v_T` in one step: `sqrt(alpha_bar) v_0 + sqrt(1 - alpha_bar) noise`."""
    return math.sqrt(alpha_bar) * values + math.sqrt(1.0 - alpha_bar) * noise


def bury(
    picture: Pixels,
    mask: Mask,
    confidence: int,
    schedule: Schedule,
    generator: torch.Generator,
    method: Literal["iterate", "closed"] = "iterate",
) -> Pixels:
    """The picture with what the mask covers noised to a confidence in percent; at 100% the picture itself."""
    if confidence >= 100 or not mask.any():
        return picture
    covered = to_signed(picture[mask])
    if method == "iterate":
        noised = iterate(covered, schedule.gammas(confidence), generator)
    else:
        noise = torch.empty_like(covered).normal_(generator=generator)
        noised = jump(covered, schedule.alpha_bar(confidence), noise)
    buried = picture.copy()
    buried[mask] = to_bytes(noised)
    return buried


def fit(image: Image.Image, canvas: CanvasConfig, resample: Image.Resampling) -> Image.Image:
    """The picture as the model's host code resizes it: shortest edge and centre crop, or both edges."""
    size = canvas.size
    if canvas.fit == "squash":
        return image.resize((size, size), resample)
    width, height = image.size
    shape = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    if image.size != shape:
        image = image.resize(shape, resample)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def on_canvas(picture: Pixels, mask: Mask, canvas: CanvasConfig) -> tuple[Pixels, Mask]:
    """Picture and mask on the canvas that training would noise."""
    small = np.asarray(fit(Image.fromarray(picture), canvas, Image.Resampling.BICUBIC))
    if mask.shape == small.shape[:2]:
        return small, mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return small, np.asarray(fit(grey, canvas, Image.Resampling.BILINEAR)) >= 128


def seeded(seed: int, item: str, confidence: int) -> torch.Generator:
    """Random numbers that depend on the run's seed, the question and the confidence alone."""
    digest = hashlib.sha256(f"{seed}/{confidence}/{item}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class PerturbStage:
    """Materialized mode: every question at every confidence level, with its perturbed picture."""

    name = "perturb"

    def __init__(self, config: PerturbConfig, seed: int):
        self.config, self.seed = config, seed
        self.schedule = Schedule(config.schedule, config.t_max, config.noise_gamma, config.floor)

    def __call__(self, batch: list[Unit]) -> None:
        for unit in batch:
            for item in list(unit.items):
                if not item.regions and self.config.region != "global":
                    unit.reject(item, self.name, "nothing_to_perturb", "a question without a region")
                    continue
                unit.made += self._items(unit, item)

    def _items(self, unit: Unit, item: Item) -> list[Item]:
        assert unit.picture is not None
        picture, mask = unit.picture, self._mask(unit, item)
        if self.config.space == "model":
            picture, mask = on_canvas(picture, mask, self.config.canvas)
        made = []
        for confidence in self._levels(item.id):
            generator = seeded(self.seed, item.id, confidence)
            buried = bury(picture, mask, confidence, self.schedule, generator, self.config.method)
            data = png(buried) if self.config.encoding == "png" else jpeg(buried, self.config.quality)
            name = f"{item.id}@{confidence}"
            made.append(dataclasses.replace(item, id=name, confidence=float(confidence), perturbed_image=data))
        return made

    def _mask(self, unit: Unit, item: Item) -> Mask:
        total = np.zeros(unit.size, bool)
        if self.config.region == "global":
            return ~total
        for index in item.regions:
            if self.config.region == "box":
                x0, y0, x1, y1 = (round(edge) for edge in unit.regions[index].box)
                total[y0:y1, x0:x1] = True
            else:
                total |= unit.mask(index)
        return total

    def _levels(self, item: str) -> list[int]:
        levels = sorted(set(self.config.levels))
        if not self.config.draw:
            return levels
        digest = hashlib.sha256(f"{self.seed}/levels/{item}".encode()).digest()
        chosen = np.random.default_rng(list(digest)).choice(levels, self.config.draw, replace=False)
        return sorted(int(level) for level in chosen)
