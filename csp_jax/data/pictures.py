"""From an opened picture to what a family's model is shown of it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from PIL import Image

from csp_jax.data.batch import Picture, Sample
from csp_jax.families.interface import HostFamily


def show(
    family: HostFamily,
    image: Image.Image,
    region: Bool[np.ndarray, "height width"] | bool = False,
    confidence: float = 100.0,
    noise_id: int = 0,
) -> Picture:
    """A picture as the family's canvas; `region` of it (or all, or nothing) may be buried."""
    canvas = family.canvas(image)
    mask = np.full(canvas.shape[:2], region) if isinstance(region, bool) else family.canvas_mask(region)
    return Picture(canvas, mask, confidence, noise_id, family.cell, family.overview(image))


def check_slots(family: HostFamily, sample: Sample) -> Sample:
    """The sample, if its prompt has as many slots as its pictures have features: a mismatch would shift them all."""
    slots = sum(token == family.image_token for token in sample.prompt)
    features = sum(family.image_tokens(picture.canvas) for picture in sample.pictures)
    if slots != features:
        raise ValueError(f"the prompt has {slots} picture slots for {features} features")
    return sample
