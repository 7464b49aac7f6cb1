"""Annotated masks against pycocotools' own encodings (golden file)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from data_prep.masks import MaskFile, Pixels, coco_segmentation, uncompress_runs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prep" / "coco_masks.json").read_text())["cases"]


def golden_mask(case: dict) -> np.ndarray:
    height, width = case["size"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(case["mask"]), np.uint8))
    return bits[: height * width].reshape(height, width).astype(bool)


@pytest.mark.parametrize("case", [case for case in GOLDEN if "counts" in case], ids=lambda c: f"{c['kind']}{c['size']}")
def test_run_lengths_are_read_exactly(case):
    height, width = case["size"]
    truth = golden_mask(case)
    compressed = coco_segmentation({"counts": case["counts"], "size": case["size"]}, height, width)
    np.testing.assert_array_equal(compressed.render(height, width), truth)
    plain = coco_segmentation({"counts": uncompress_runs(case["counts"].encode())}, height, width)
    np.testing.assert_array_equal(plain.render(height, width), truth)


@pytest.mark.parametrize("case", [case for case in GOLDEN if "segmentation" in case], ids=range(8))
def test_outlines_differ_from_cocos_at_most_on_their_edge(case):
    """COCO rounds outlines on a grid of a fifth of a pixel; centres further than that from an edge agree."""
    height, width = case["size"]
    truth = golden_mask(case)
    found = coco_segmentation(case["segmentation"], height, width).render(height, width)
    ring = scipy.ndimage.binary_dilation(truth) & ~scipy.ndimage.binary_erosion(truth)
    assert not ((found != truth) & ~ring).any()
    assert (found != truth).sum() <= 0.1 * ring.sum() + 2


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ("x", "outlines"),
        ([[1, 2, 3, 4]], "outline of 4"),
        ({"counts": [5, 5], "size": [4, 4]}, "cover 10"),
        ({"counts": "o", "size": [4, 4]}, "end within"),
        ({"counts": [16], "size": [2, 8]}, "2 x 8"),
    ],
)
def test_what_is_no_mask_of_this_picture_is_an_error(segmentation, problem):
    with pytest.raises(ValueError, match=problem):
        coco_segmentation(segmentation, 4, 4).render(4, 4)


def test_mask_files_by_brightness_or_alpha(tmp_path):
    mask = np.zeros((6, 9), bool)
    mask[2:4, 3:8] = True
    Image.fromarray(mask).save(tmp_path / "bits.png")
    Image.fromarray(mask.astype(np.uint8) * 200).save(tmp_path / "grey.png")
    pixels = np.full((6, 9, 4), 255, np.uint8)
    pixels[..., 3] = mask * 130
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    for name in ("bits", "grey", "alpha"):
        np.testing.assert_array_equal(MaskFile(tmp_path / f"{name}.png").render(6, 9), mask)
    with pytest.raises(ValueError, match="6 x 9"):
        MaskFile(tmp_path / "bits.png").render(9, 6)
    with pytest.raises(ValueError, match="cannot be read"):
        MaskFile(tmp_path / "none.png").render(6, 9)
    with pytest.raises(ValueError, match="for a picture"):
        Pixels(mask).render(9, 6)
