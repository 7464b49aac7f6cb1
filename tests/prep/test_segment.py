"""Boxes -> masks: SAM against its authors' outputs (golden files), GrabCut against true outlines, and the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import prep_samples
import pytest
import torch
from prep_models import tiny_sam
from prep_runs import config_of, prepared, records, rejects

from csp_jax.errors import UserError
from csp_jax.records import Item, decode_mask
from data_prep.config import GrabcutSegmenter, SamSegmenter, SegmentConfig, TransformersSam
from data_prep.masks import Pixels
from data_prep.run import prepare
from data_prep.segment.grabcut import GrabCut
from data_prep.segment.interface import Segmentation
from data_prep.segment.sam_transformers import SamByTransformers
from data_prep.segment.sam_weights import sam_model
from data_prep.segment.stage import SegmentStage
from data_prep.unit import Region, Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "prep"
HEADS = 2  # of the golden model's decoder; published ones have eight


def golden_state() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "sam_tiny_weights.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def golden_case(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "sam_tiny_cases.npz") as stored:
        case = {key.split("/")[1]: stored[key] for key in stored.files if key.startswith(name)}
    shape = tuple(case["mask_shape"])
    case["masks"] = np.unpackbits(case["mask_bits"])[: np.prod(shape)].reshape(shape).astype(bool)
    return case


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> SamByTransformers:
    """The golden weights, read from a `.pth` file in segment-anything's names."""
    path = tmp_path_factory.mktemp("sam") / "sam_tiny.pth"
    torch.save(golden_state(), path)
    segmenter = SamByTransformers(TransformersSam(name="sam", checkpoint=str(path), prompts=2))
    segmenter.model = sam_model(golden_state(), "golden", decoder_heads=HEADS).eval()
    return segmenter


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_sam_agrees_with_segment_anything(sam, name):
    """Masks of its own predictor: low-resolution logits, estimates, and the mask at the picture's size."""
    case = golden_case(name)
    box = case["box"].tolist()
    fed = sam.processor(images=case["image"], input_boxes=[[box]], return_tensors="pt")
    with torch.no_grad():
        outputs = sam.model(pixel_values=fed["pixel_values"], input_boxes=fed["input_boxes"].float())
    assert np.abs(outputs.pred_masks[0, 0].numpy() - case["lowres"]).max() < 1e-4
    np.testing.assert_allclose(outputs.iou_scores[0, 0].numpy(), case["scores"], atol=1e-5)
    (found,) = sam(case["image"], [tuple(box)])
    best = int(case["scores"].argmax())
    np.testing.assert_array_equal(found.mask, case["masks"][best])
    assert found.score == pytest.approx(min(1.0, float(case["scores"][best])), abs=1e-5)


def test_a_picture_is_embedded_once_however_many_boxes(sam, monkeypatch):
    case = golden_case("img0")
    boxes = [tuple(case["box"].tolist()), (5.0, 5.0, 90.0, 60.0), (100.0, 30.0, 180.0, 110.0)]
    alone = [sam(case["image"], [box])[0] for box in boxes]
    calls = []
    embed = sam.model.get_image_embeddings
    monkeypatch.setattr(sam.model, "get_image_embeddings", lambda *a: calls.append(1) or embed(*a))
    together = sam(case["image"], boxes)
    assert len(calls) == 1
    for one, other in zip(together, alone, strict=True):
        assert (one.mask != other.mask).mean() < 1e-3
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    state = golden_state()
    (tmp_path / "noise.pth").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="cannot be read"):
        SamByTransformers(TransformersSam(name="sam", checkpoint=str(tmp_path / "noise.pth")))
    lost = {name: tensor for name, tensor in state.items() if "neck.0" not in name}
    with pytest.raises(UserError, match=r"neck\.conv1"):
        sam_model(lost, "lost.pth", HEADS)
    with pytest.raises(UserError, match="extra"):
        sam_model({**state, "mask_decoder.extra": torch.zeros(1)}, "more.pth", HEADS)
    with pytest.raises(UserError, match="is no SAM checkpoint"):
        sam_model({"weights": torch.zeros(1)}, "other.pth")


def test_a_folder_in_transformers_layout(tmp_path):
    segmenter = SamByTransformers(TransformersSam(name="sam", checkpoint=str(tiny_sam(tmp_path))))
    picture = np.asarray(prep_samples.picture(1))
    (found,) = segmenter(picture, [tuple(map(float, prep_samples.BOX))])
    assert found.mask.shape == picture.shape[:2]
    assert found.mask.dtype == bool
    assert 0 <= found.score <= 1
    with pytest.raises(UserError, match=r"segment\.model"):
        SamByTransformers(TransformersSam(name="sam", checkpoint=str(tmp_path.parent)))


def test_sam2_by_transformers(tmp_path):
    pytest.importorskip("torchvision", reason="SAM2's processor needs torchvision: make test-sam runs this")
    from prep_models import tiny_sam2

    segmenter = SamByTransformers(TransformersSam(name="sam2", checkpoint=str(tiny_sam2(tmp_path)), prompts=2))
    picture = np.asarray(prep_samples.picture(1))
    boxes = [tuple(map(float, prep_samples.BOX)), (0.0, 0.0, 30.0, 30.0), (40.0, 10.0, 90.0, 70.0)]
    found = segmenter(picture, boxes)
    assert [one.mask.shape for one in found] == [picture.shape[:2]] * 3
    alone = [segmenter(picture, [box])[0] for box in boxes]
    for one, other in zip(found, alone, strict=True):
        assert (one.mask != other.mask).mean() < 0.01
        assert 0 <= one.score <= 1


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_segment_anything_itself(name):
    pytest.importorskip("torchvision", reason="segment-anything needs torchvision: make test-sam runs this")
    pytest.importorskip("segment_anything", reason="segment-anything is not installed: make test-sam runs this")
    from prep_models import segment_anything_model

    from data_prep.segment.sam_anything import SegmentAnything

    case = golden_case(name)
    config = SamSegmenter(name="segment-anything", checkpoint="none.pth", device="cpu")
    segmenter = SegmentAnything(config, model=segment_anything_model(golden_state(), HEADS))
    (found,) = segmenter(case["image"], [tuple(case["box"].tolist())])
    best = int(case["scores"].argmax())
    np.testing.assert_array_equal(found.mask, case["masks"][best])
    assert found.score == pytest.approx(min(1.0, float(case["scores"][best])), abs=1e-5)


@pytest.mark.parametrize(("kind", "blocks", "heads"), [("vit_b", 12, 12), ("vit_l", 24, 16), ("vit_h", 32, 16)])
def test_every_published_size_fits(kind, blocks, heads):
    """Names and shapes of the authors' models, without their weights."""
    pytest.importorskip("torchvision", reason="segment-anything needs torchvision: make test-sam runs this")
    pytest.importorskip("segment_anything", reason="segment-anything is not installed: make test-sam runs this")
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        theirs = sam_model_registry[kind]()
        mine = sam_model(theirs.state_dict(), kind)
    vision = mine.config.vision_config
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (blocks, heads)
    assert vision.num_attention_heads == theirs.image_encoder.blocks[0].attn.num_heads
    assert (vision.image_size, vision.window_size) == (1024, 14)
    assert [n for n, block in enumerate(theirs.image_encoder.blocks) if not block.window_size] == list(
        vision.global_attn_indexes
    )
    sizes = [
        sum(p.numel() for p in part.parameters())
        for whole in (theirs, mine)
        for part in (getattr(whole, "image_encoder", None) or whole.vision_encoder, whole.mask_decoder)
    ]
    assert sizes[:2] == sizes[2:]


def test_segment_anything_says_what_is_missing(tmp_path):
    from data_prep.segment.sam_anything import SegmentAnything

    with pytest.raises(UserError, match=r"cannot be imported|there is no such checkpoint"):
        SegmentAnything(SamSegmenter(name="segment-anything", checkpoint=str(tmp_path / "sam_vit_b.pth")))


# --- GrabCut ----------------------------------------------------------------------------------------------------


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1, 8])
def test_grabcut_finds_the_disc_in_its_box(seed, scale):
    """Better than the box, at full size and where the picture is cut at a smaller one."""
    size = (prep_samples.WIDTH * scale, prep_samples.HEIGHT * scale)
    picture = np.asarray(prep_samples.picture(seed, size))
    box = tuple(float(edge * scale) for edge in prep_samples.BOX)
    truth = np.kron(prep_samples.disc(), np.ones((scale, scale), bool))
    (found,) = GrabCut(GrabcutSegmenter(name="grabcut", side=256))(picture, [box])
    assert found.mask.shape == picture.shape[:2]
    assert overlap(found.mask, truth) > 0.93
    again = GrabCut(GrabcutSegmenter(name="grabcut", side=256))(picture, [box])[0].mask
    np.testing.assert_array_equal(found.mask, again)


def test_grabcut_gives_the_box_where_there_is_nothing_to_learn_from():
    flat = np.full((40, 60, 3), 90, np.uint8)
    whole, part = GrabCut(GrabcutSegmenter(name="grabcut"))(flat, [(0.0, 0.0, 60.0, 40.0), (10.0, 10.0, 30.0, 30.0)])
    assert whole.mask.all()
    assert part.mask.any()


# --- the stage --------------------------------------------------------------------------------------------------


class Drawn:
    """A segmenter that returns what it is told for each box."""

    def __init__(self, *masks: tuple[np.ndarray, float]):
        self.masks, self.calls = list(masks), []

    def __call__(self, picture: np.ndarray, boxes: list[Any]) -> list[Segmentation]:
        self.calls.append(boxes)
        return [Segmentation(*self.masks.pop(0)) for _ in boxes]


def unit_of(regions: list[Region], *questions: tuple[int, ...]) -> Unit:
    items = [Item(id=str(n), question="?", keyword="cat", regions=places) for n, places in enumerate(questions)]
    unit = Unit(0, "u", "p", None, len(items), items, {i.id: i.id for i in items}, regions)
    unit.picture = np.zeros((20, 30, 3), np.uint8)
    return unit


def block(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((20, 30), bool)
    mask[y0:y1, x0:x1] = True
    return mask


BOX = (5.0, 5.0, 15.0, 15.0)


def test_annotated_masks_pass_and_a_picture_is_segmented_once():
    given = Region("cat", BOX, mask=Pixels(block(6, 9, 6, 9)))
    unit = unit_of([given, Region("cat", BOX), Region("dog", BOX), Region("unused", BOX)], (0, 1), (1, 2))
    segmenter = Drawn((block(5, 10, 5, 10), 0.8), (block(5, 15, 5, 15), 0.7))
    SegmentStage(SegmentConfig(), segmenter)([unit])
    assert segmenter.calls == [[BOX, BOX]]
    np.testing.assert_array_equal(unit.mask(0), block(6, 9, 6, 9))
    np.testing.assert_array_equal(unit.mask(1), block(5, 10, 5, 10))
    assert [region.mask_score for region in unit.regions] == [1.0, 0.8, 0.7, 1.0]
    assert unit.regions[3].mask is None


@pytest.mark.parametrize(
    ("mask", "score", "settings", "problem"),
    [
        (block(0, 0, 0, 0), 1.0, {}, "mask_too_small"),
        (block(5, 6, 5, 6), 1.0, {"least_area": 0.01}, "mask_too_small"),
        (block(0, 20, 0, 30), 1.0, {}, "mask_too_large"),
        (block(5, 6, 5, 9), 1.0, {"least_filled": 0.1}, "mask_too_thin"),
        (block(5, 15, 5, 15), 0.4, {"least_score": 0.5}, "mask_too_unsure"),
    ],
)
def test_masks_beyond_the_limits(mask, score, settings, problem):
    unit = unit_of([Region("cat", BOX)], (0,))
    SegmentStage(SegmentConfig(**settings), Drawn((mask, score)))([unit])
    np.testing.assert_array_equal(unit.mask(0), block(5, 15, 5, 15))
    assert unit.counts == {f"box_for_{problem}": 1}
    unit = unit_of([Region("cat", BOX)], (0,))
    SegmentStage(SegmentConfig(**settings, otherwise="reject"), Drawn((mask, score)))([unit])
    assert [(r.stage, r.reason) for r in unit.rejects] == [("segment", problem)]


def test_a_question_keeps_the_regions_that_hold():
    good, bad = (
        Region("cat", BOX, mask=Pixels(block(5, 9, 5, 9))),
        Region("cat", BOX, mask=Pixels(np.ones((3, 3), bool))),
    )
    unit = unit_of([good, bad], (0, 1), (1,))
    SegmentStage(SegmentConfig(), None)([unit])
    assert [item.regions for item in unit.items] == [(0,)]
    assert unit.counts["masks_dropped"] == 1
    assert [(r.reason, r.id) for r in unit.rejects] == [("bad_mask", "1")]


def test_several_regions_can_be_united():
    first = Region("cat", (5, 5, 9, 9), 0.4, mask=Pixels(block(5, 9, 5, 9)))
    second = Region("cat", (12, 2, 20, 15), 0.9, mask=Pixels(block(2, 15, 12, 20)))
    unit = unit_of([first, second], (0, 1), (0, 1), (0,))
    SegmentStage(SegmentConfig(), None, "union")([unit])
    assert [item.regions for item in unit.items] == [(2,), (2,), (0,)]
    assert unit.regions[2].box == (5, 2, 20, 15)
    assert unit.regions[2].score == 0.9
    np.testing.assert_array_equal(unit.mask(2), block(5, 9, 5, 9) | block(2, 15, 12, 20))


def test_a_whole_run_with_grabcut_and_its_sanity_in_the_ledger(tmp_path):
    import json

    done = prepared("folder", tmp_path, segment={"model": {"name": "grabcut"}})
    mug, cup, _ = records(done.directory)
    for record in (mug, cup):
        mask = decode_mask(record.regions[0].mask, prep_samples.HEIGHT, prep_samples.WIDTH)
        assert overlap(mask, prep_samples.disc()) > 0.93
    (first, second, _) = (json.loads(line) for line in (done.directory / "ledger.jsonl").read_text().splitlines())
    assert first["regions"][0]["origin"] == "annotation"
    assert second["regions"][0]["mask_area"] == pytest.approx(prep_samples.disc().mean(), abs=0.02)
    assert second["regions"][0]["box_area"] == pytest.approx(1600 / (96 * 72), abs=1e-6)
    assert rejects(done.directory) == []


def test_a_whole_run_with_sam(tmp_path):
    model = {"name": "sam", "checkpoint": str(tiny_sam(tmp_path / "sam"))}
    prep_samples.folder(tmp_path / "folder")
    config = config_of("folder", tmp_path / "folder", tmp_path / "out", segment={"model": model, "otherwise": "box"})
    stored = records(prepare(config).directory)
    assert [len(record.regions) for record in stored] == [1, 1, 0]
