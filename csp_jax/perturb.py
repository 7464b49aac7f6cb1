"""Burying a key object under diffusion noise, on the device ([A] 3.2).

The iteration `v_t ~ N(sqrt(1 - gamma) v_{t-1}, gamma I)` has the closed form
`v_T = sqrt(alpha_bar) v_0 + sqrt(1 - alpha_bar) noise`, elementwise, with `alpha_bar = (1 - gamma)^T`; other
schedules are other functions from a confidence to `alpha_bar`. Canvases are in [-1, 1] while they are noised.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8, UInt32

ScheduleName = Literal["constant", "linear", "ddpm", "cosine", "none"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much of the picture a confidence leaves.

    `constant`: the paper's constant `noise_gamma` over at most `t_max` steps. `linear`: alpha_bar falls
    linearly from 1 at 100% to `floor` at 0%. `ddpm`: linearly growing betas 1e-4..0.02 (Ho et al. 2020).
    `cosine`: Nichol and Dhariwal 2021. `none`: no noise (a control).
    """

    name: ScheduleName = "constant"
    t_max: int = 500
    noise_gamma: float = 0.01
    floor: float = 0.0066

    def steps(self, confidence: Float[Array, "..."]) -> Float[Array, "..."]:
        """`T_c = floor(t_max (1 - c / 100))`, exact for integer percents.

        A compiler may divide by multiplying with the rounded reciprocal, so the quotient is put right afterwards.
        """
        hundredfold = self.t_max * (100.0 - confidence)
        steps = jnp.floor(hundredfold / 100.0)
        steps = jnp.where(steps * 100.0 > hundredfold, steps - 1.0, steps)
        return jnp.where((steps + 1.0) * 100.0 <= hundredfold, steps + 1.0, steps)

    def alpha_bar(self, confidence: Float[Array, "..."]) -> Float[Array, "..."]:
        """The share of signal variance that confidence (percent) leaves, in [0, 1]; exactly 1 at 100%."""
        return jnp.where(confidence >= 100.0, 1.0, jnp.clip(self._alpha_bar(confidence), 0.0, 1.0))

    def _alpha_bar(self, confidence: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.name == "none":
            return jnp.ones_like(confidence)
        if self.name == "linear":
            return 1.0 - (1 - self.floor) * (100.0 - confidence) / 100.0
        steps = self.steps(confidence)
        if self.name == "constant":
            return jnp.exp(steps * jnp.log1p(-self.noise_gamma))
        if self.name == "cosine":
            offset = 0.008
            phase = (steps / self.t_max + offset) / (1 + offset) * jnp.pi / 2
            return jnp.cos(phase) ** 2 / jnp.cos(offset / (1 + offset) * jnp.pi / 2) ** 2
        betas = jnp.linspace(1e-4, 0.02, self.t_max)
        table = jnp.concatenate([jnp.ones(1), jnp.cumprod(1 - betas)])
        return table[steps.astype(jnp.int32)]


def to_canvas(image: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Bytes -> [-1, 1], in one rounding: the same bits in whichever program they are computed."""
    return (image.astype(jnp.float32) * 2.0 - 255.0) * (1 / 255.0)


def bury(
    canvas: Float[Array, "height width 3"],
    mask: Bool[Array, "height width"],
    alpha_bar: Float[Array, ""],
    key: Array,
) -> Float[Array, "height width 3"]:
    """`m * v_T + (1 - m) * v_0`, clipped to [-1, 1]: only what the mask covers changes."""
    noise = jax.random.normal(key, canvas.shape, canvas.dtype)
    noised = jnp.sqrt(alpha_bar) * canvas + jnp.sqrt(1 - alpha_bar) * noise
    return jnp.where(mask[..., None], jnp.clip(noised, -1.0, 1.0), canvas)


def perturb(
    images: UInt8[Array, "batch pictures height width 3"],
    masks: Bool[Array, "batch pictures height width"],
    confidence: Float[Array, "batch pictures"],
    noise_id: UInt32[Array, "batch pictures"],
    key: Array,
    schedule: Schedule,
) -> Float[Array, "batch pictures height width 3"]:
    """Canvases in [-1, 1] with each picture's region buried as its confidence says.

    The noise of a picture depends on `key` (seed and step folded in) and its own `noise_id` alone: not on its
    place in the batch, on the devices, or on how often the run was resumed.
    """
    canvas = to_canvas(images)
    if schedule.name == "none" or canvas.size == 0:
        return canvas
    flat = (-1, *images.shape[2:])
    keys = jax.vmap(lambda identity: jax.random.fold_in(key, identity))(noise_id.reshape(-1))
    alpha_bar = schedule.alpha_bar(confidence).reshape(-1)
    noised = jax.vmap(bury)(canvas.reshape(flat), masks.reshape(flat[:3]), alpha_bar, keys)
    return noised.reshape(canvas.shape)
