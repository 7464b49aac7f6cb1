"""SAM by its authors' own package (segment-anything, which needs torchvision)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from csp_jax.errors import UserError
from csp_jax.manifest import sha256_of
from data_prep.checkpoints import choose_device
from data_prep.config import SamSegmenter
from data_prep.segment.interface import Segmentation
from data_prep.unit import Box


class SegmentAnything:
    """The candidate mask with the best estimated IoU for each box; one embedding a picture."""

    def __init__(self, config: SamSegmenter, model: Any = None):
        try:
            from segment_anything import SamPredictor, sam_model_registry
        except ImportError as error:
            raise UserError(
                f"segment-anything cannot be imported ({error})",
                field="segment.model.name",
                value=config.name,
                mend="Install the `prep` extra; segment.model.name=sam reads the same .pth files without it",
            ) from None
        device = choose_device(config.device, "segment.model.device")
        path = Path(config.checkpoint)
        if model is None:
            if not path.is_file():
                mend = "Give the path of sam_vit_{b,l,h}_*.pth"
                raise UserError("there is no such checkpoint", file=path, field="segment.model.checkpoint", mend=mend)
            try:
                model = sam_model_registry[config.type](checkpoint=str(path))
            except (RuntimeError, ValueError, EOFError) as error:
                problem = f"is no {config.type} checkpoint ({type(error).__name__})"
                raise UserError(problem, file=path, field="segment.model.type", mend="Name the file's type") from None
        self.weights = sha256_of(path) if path.is_file() else ""
        self._predictor = SamPredictor(model.to(device).eval())

    @torch.inference_mode()
    def __call__(self, picture: UInt8[np.ndarray, "height width 3"], boxes: list[Box]) -> list[Segmentation]:
        """A mask for each box, at the picture's size, with the model's own estimate of its IoU."""
        predictor = self._predictor
        predictor.set_image(picture)
        corners = torch.tensor(boxes, dtype=torch.float32, device=predictor.device)
        moved = predictor.transform.apply_boxes_torch(corners, picture.shape[:2])
        masks, scores, _ = predictor.predict_torch(None, None, boxes=moved, multimask_output=True)
        best = scores.argmax(dim=1)
        rows = torch.arange(len(boxes), device=best.device)
        chosen, estimates = masks[rows, best].cpu().numpy(), scores[rows, best].clamp(0, 1).tolist()
        return [Segmentation(mask, score) for mask, score in zip(chosen, estimates)]
