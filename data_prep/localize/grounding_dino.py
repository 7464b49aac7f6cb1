"""GroundingDINO by transformers, or another zero-shot detector of its; batched, in half precision on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from csp_jax.errors import UserError
from data_prep.checkpoints import choose_device, choose_dtype, hash_folder, local_folder
from data_prep.config import DinoDetector
from data_prep.localize.interface import Detection


def phrase(keyword: str) -> str:
    """A keyword as the text that the detector is prompted with: lower case, ended by a period."""
    return keyword.lower().replace(".", " ").strip() + "."


class ZeroShotDetector:
    """Boxes of one keyword in each picture of a batch, above both thresholds of the model's own post-processing."""

    def __init__(self, config: DinoDetector):
        from transformers import AutoModelForZeroShotObjectDetection

        self.config = config
        self.device = choose_device(config.device, "localize.detector.device")
        self.dtype = choose_dtype(config.dtype, self.device)
        folder = local_folder(config.checkpoint, "localize.detector.checkpoint")
        self.weights = hash_folder(folder)
        try:
            self.processor = open_processor(folder)
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"cannot be loaded ({error})",
                file=folder,
                field="localize.detector.checkpoint",
                mend="It must be GroundingDINO or another zero-shot detector in transformers' layout",
            ) from error
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(
        self, pictures: list[UInt8[np.ndarray, "height width 3"]], keywords: list[str]
    ) -> list[list[Detection]]:
        """The boxes of `keywords[i]` in `pictures[i]`, the best first."""
        texts = [phrase(keyword) for keyword in keywords]
        fed = self.processor(
            images=[Image.fromarray(picture) for picture in pictures], text=texts, padding=True, return_tensors="pt"
        ).to(self.device)
        # Weights stay in single precision; the products are taken in half. (Its position codes overflow otherwise.)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.model(**fed)
        found = self.post_process(outputs, fed["input_ids"], [picture.shape[:2] for picture in pictures])
        return [self._detections(one) for one in found]

    def post_process(self, outputs: Any, input_ids: torch.Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The processor's own boxes, scores and phrases: of each picture, in its pixels."""
        return self.processor.post_process_grounded_object_detection(
            outputs,
            input_ids,
            threshold=self.config.box_threshold,
            text_threshold=self.config.text_threshold,
            target_sizes=sizes,
        )

    def _detections(self, found: dict[str, Any]) -> list[Detection]:
        """Boxes to which the text threshold leaves at least one word of the keyword, not only the marks around it."""
        rows = zip(found["boxes"].float().tolist(), found["scores"].float().tolist(), found["text_labels"])
        kept = [Detection((x0, y0, x1, y1), score) for (x0, y0, x1, y1), score, words in rows if self._names(words)]
        return sorted(kept, key=lambda detection: -detection.score)

    def _names(self, words: str) -> bool:
        tokenizer = self.processor.tokenizer
        for mark in tokenizer.all_special_tokens:
            words = words if mark == tokenizer.unk_token else words.replace(mark, "")
        return bool(words.strip(" ."))


def open_processor(folder: Any) -> Any:
    """The checkpoint's processor; its image half by Pillow where torchvision is not installed."""
    from transformers import AutoProcessor, AutoTokenizer, GroundingDinoImageProcessorPil, GroundingDinoProcessor
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    return GroundingDinoProcessor(
        GroundingDinoImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )
