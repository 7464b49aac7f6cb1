"""SAM and SAM2 by transformers: one embedding a picture, its boxes decoded in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.manifest import sha256_of
from data_prep.checkpoints import choose_device, choose_dtype, hash_folder, local_folder
from data_prep.config import TransformersSam
from data_prep.segment.interface import Segmentation
from data_prep.segment.sam_weights import sam_model
from data_prep.unit import Box


class SamByTransformers:
    """The candidate mask with the best estimated IoU for each box."""

    def __init__(self, config: TransformersSam):
        self.config = config
        self.device = choose_device(config.device, "segment.model.device")
        self.dtype = choose_dtype(config.dtype, self.device)
        if config.checkpoint.endswith(".pth"):
            self.model, self.processor, self.weights = _published(Path(config.checkpoint))
        else:
            folder = local_folder(config.checkpoint, "segment.model.checkpoint")
            self.weights = hash_folder(folder)
            self.model, self.processor = _open(config.name, folder)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, picture: UInt8[np.ndarray, "height width 3"], boxes: list[Box]) -> list[Segmentation]:
        """A mask for each box, at the picture's size, with the model's own estimate of its IoU."""
        image = Image.fromarray(picture)
        found: list[Segmentation] = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embedding = None
            for start in range(0, len(boxes), self.config.prompts):
                part = [[list(box) for box in boxes[start : start + self.config.prompts]]]
                fed = self.processor(images=image, input_boxes=part, return_tensors="pt")
                if embedding is None:
                    embedding = self.model.get_image_embeddings(fed["pixel_values"].to(self.device))
                found += self._decode(fed, embedding)
        return found

    def _decode(self, fed: Any, embedding: Any) -> list[Segmentation]:
        """`image_embeddings` instead of pixels: the picture is not looked at again."""
        boxes = fed["input_boxes"].to(self.device, torch.float32)
        outputs = self.model(image_embeddings=embedding, input_boxes=boxes, multimask_output=True)
        scores = outputs.iou_scores[0].float()
        best = scores.argmax(dim=-1)
        chosen = outputs.pred_masks[0][torch.arange(len(best)), best][None, :, None].float()
        sizes = {"original_sizes": fed["original_sizes"]}
        if "reshaped_input_sizes" in fed:
            sizes["reshaped_input_sizes"] = fed["reshaped_input_sizes"]
        masks = self.processor.post_process_masks(chosen.cpu(), **sizes)[0][:, 0].numpy().astype(bool)
        estimates = scores.max(dim=-1).values.clamp(0, 1).tolist()
        return [Segmentation(mask, score) for mask, score in zip(masks, estimates)]


def _published(path: Path) -> tuple[Any, Any, str]:
    """Model and processor of one of SAM's `.pth` files."""
    from transformers import SamImageProcessorPil, SamProcessor

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot be read ({type(error).__name__})",
            file=path,
            field="segment.model.checkpoint",
            mend="Download sam_vit_{b,l,h}_*.pth again",
        ) from None
    model = sam_model(state, str(path))
    edge, grid = model.config.vision_config.image_size, model.config.prompt_encoder_config.image_embedding_size
    processor = SamImageProcessorPil(
        size={"longest_edge": edge},
        pad_size={"height": edge, "width": edge},
        mask_size={"longest_edge": 4 * grid},
        mask_pad_size={"height": 4 * grid, "width": 4 * grid},
    )
    return model, SamProcessor(processor), sha256_of(path)


def _open(name: str, folder: Path) -> tuple[Any, Any]:
    """Model and processor of a folder in transformers' layout."""
    try:
        if name == "sam2":
            from transformers import Sam2Model, Sam2Processor

            return Sam2Model.from_pretrained(folder), Sam2Processor.from_pretrained(folder)
        from transformers import SamImageProcessorPil, SamModel, SamProcessor

        return SamModel.from_pretrained(folder), SamProcessor(SamImageProcessorPil.from_pretrained(folder))
    except ImportError as error:
        mend = "Install the `prep` extra, which has torchvision, or use segment.model.name=sam"
        raise UserError(str(error).strip().splitlines()[0], field="segment.model.name", value=name, mend=mend) from None
    except (OSError, ValueError, KeyError) as error:
        mend = "Give a folder that transformers can load, or one of SAM's .pth files"
        raise UserError(f"cannot be loaded ({error})", file=folder, field="segment.model", mend=mend) from error
