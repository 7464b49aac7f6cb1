"""GrabCut (Rother, Kolmogorov and Blake 2004) by OpenCV: a mask from a box, without weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8

from data_prep.config import GrabcutSegmenter
from data_prep.segment.interface import Segmentation
from data_prep.unit import Box

MARGIN = 0.5  # of the box's sides: the surroundings that the background's colours are learned from


class GrabCut:
    """Colours inside a box against those around it. Large pictures are cut at `side` pixels and scaled back."""

    def __init__(self, config: GrabcutSegmenter):
        import cv2

        self.config, self._cv2 = config, cv2
        self.weights = f"opencv {cv2.__version__}"

    def __call__(self, picture: UInt8[np.ndarray, "height width 3"], boxes: list[Box]) -> list[Segmentation]:
        """A mask for each box. GrabCut estimates no quality: the score is 1."""
        return [Segmentation(self._cut(picture, box), 1.0) for box in boxes]

    def _cut(self, picture: UInt8[np.ndarray, "height width 3"], box: Box) -> Bool[np.ndarray, "height width"]:
        height, width = picture.shape[:2]
        x0, y0, x1, y1 = (round(edge) for edge in box)
        grow_x, grow_y = round((x1 - x0) * MARGIN) + 2, round((y1 - y0) * MARGIN) + 2
        left, top, right, bottom = (
            max(0, x0 - grow_x),
            max(0, y0 - grow_y),
            min(width, x1 + grow_x),
            min(height, y1 + grow_y),
        )
        crop = picture[top:bottom, left:right]
        scale = min(1.0, self.config.side / max(crop.shape[:2]))
        size = max(2, round(crop.shape[1] * scale)), max(2, round(crop.shape[0] * scale))
        small = self._cv2.resize(crop, size, interpolation=self._cv2.INTER_AREA) if scale < 1 else crop
        inner = [round((edge - start) * scale) for edge, start in ((x0, left), (y0, top), (x1, left), (y1, top))]
        cut = self._grab(small, inner)
        if scale < 1:
            cut = self._cv2.resize(cut.astype(np.uint8) * 255, (crop.shape[1], crop.shape[0])) >= 128
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = cut
        return mask

    def _grab(self, picture: UInt8[np.ndarray, "height width 3"], box: list[int]) -> Bool[np.ndarray, "height width"]:
        """The object's pixels; the whole box where there is no surrounding to tell it from, or nothing is found."""
        cv2 = self._cv2
        x0, y0, x1, y1 = box
        labels = np.full(picture.shape[:2], cv2.GC_BGD, np.uint8)
        labels[y0:y1, x0:x1] = cv2.GC_PR_FGD
        rectangle = labels == cv2.GC_PR_FGD
        if rectangle.all() or rectangle.sum() < 16:
            return rectangle
        cv2.setRNGSeed(0)  # its clusters start at random
        colours = np.ascontiguousarray(picture[:, :, ::-1])
        try:
            cv2.grabCut(
                colours,
                labels,
                None,
                np.zeros((1, 65)),
                np.zeros((1, 65)),
                self.config.iterations,
                cv2.GC_INIT_WITH_MASK,
            )
        except cv2.error:  # too few different colours for its mixtures
            return rectangle
        found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        return found if found.any() else rectangle
