"""Keyword -> boxes: GroundingDINO's real processing on constructed outputs, and what the stage makes of boxes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import prep_samples
import pytest
import torch
from prep_models import tiny_detector
from prep_runs import config_of, prepared, records, rejects

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import DinoDetector, LocalizeConfig
from data_prep.localize.grounding_dino import ZeroShotDetector, phrase
from data_prep.localize.interface import Detection
from data_prep.localize.stage import LocalizeStage
from data_prep.run import prepare
from data_prep.unit import Region, Unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_detector(tmp_path_factory.mktemp("detector")))


def detector(folder: str, **settings: Any) -> ZeroShotDetector:
    return ZeroShotDetector(DinoDetector(name="grounding-dino", checkpoint=folder, **settings))


def constructed(finder: ZeroShotDetector, rows: list[tuple[tuple[float, ...], dict[int, float]]]) -> Any:
    """Model outputs with these queries: (centre x, centre y, width, height) as shares, and token -> probability."""
    length = finder.model.config.max_text_len
    probabilities = torch.full((1, len(rows), length), 1e-4)
    for number, (_, tokens) in enumerate(rows):
        for token, probability in tokens.items():
            probabilities[0, number, token] = probability
    boxes = torch.tensor([[box for box, _ in rows]])
    return SimpleNamespace(logits=torch.logit(probabilities), pred_boxes=boxes)


def test_boxes_thresholds_and_spans_on_constructed_outputs(folder):
    """`traffic light.` is [CLS] traffic light . [SEP]: tokens 1 and 2 are the keyword's words."""
    finder = detector(folder, box_threshold=0.4, text_threshold=0.3)
    fed = finder.processor(
        images=np.zeros((50, 80, 3), np.uint8), text=[phrase("Traffic Light")], return_tensors="pt", padding=True
    )
    words = finder.processor.tokenizer.convert_ids_to_tokens(fed["input_ids"][0])
    assert words == ["[CLS]", "traffic", "light", ".", "[SEP]"]
    outputs = constructed(
        finder,
        [
            ((0.5, 0.5, 0.25, 0.5), {1: 0.45, 2: 0.6}),  # both words
            ((0.25, 0.5, 0.5, 0.2), {1: 0.9, 2: 0.1}),  # one word is enough
            ((0.5, 0.5, 0.1, 0.1), {1: 0.39, 2: 0.39}),  # below the box threshold
            ((0.5, 0.5, 0.2, 0.2), {4: 0.95}),  # only the end mark speaks for it
        ],
    )
    found = finder.post_process(outputs, fed["input_ids"], [(50, 80)])[0]
    assert found["text_labels"][:2] == ["traffic light", "traffic"]
    detections = finder._detections(found)
    assert [round(d.score, 4) for d in detections] == [0.9, 0.6]
    # centre 0.25, 0.5 and size 0.5, 0.2 of a picture of 80 x 50
    np.testing.assert_allclose(detections[0].box, (0.0, 20.0, 40.0, 30.0), atol=1e-4)
    np.testing.assert_allclose(detections[1].box, (30.0, 12.5, 50.0, 37.5), atol=1e-4)


def test_a_batch_gives_every_picture_boxes_in_its_own_pixels(folder):
    finder = detector(folder, box_threshold=0.0, text_threshold=0.0)
    sizes = [(50, 80), (90, 60), (33, 47)]
    pictures = [np.random.default_rng(n).integers(0, 256, (*size, 3)).astype(np.uint8) for n, size in enumerate(sizes)]
    found = finder(pictures, ["cat", "traffic light", "mug"])
    assert [len(boxes) for boxes in found] == [10, 10, 10]
    for (height, width), boxes in zip(sizes, found, strict=True):
        corners = np.array([d.box for d in boxes])
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        assert (centres >= 0).all()
        assert (centres <= (width, height)).all()
        assert [d.score for d in boxes] == sorted((d.score for d in boxes), reverse=True)
    assert finder(pictures, ["cat", "traffic light", "mug"]) == found


def test_half_precision_finds_nearly_the_same(folder):
    picture = [np.asarray(prep_samples.picture(3))]
    exact, half = (
        detector(folder, box_threshold=0.0, text_threshold=0.0, dtype=dtype)(picture, ["ball"])[0]
        for dtype in ("float32", "bfloat16")
    )
    assert len(exact) == len(half) == 10
    np.testing.assert_allclose(sorted(d.score for d in half), sorted(d.score for d in exact), atol=0.05)


def test_no_detector_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"localize\.detector\.checkpoint"):
        detector(str(tmp_path))


# --- the stage --------------------------------------------------------------------------------------------------


class Known:
    """A detector that knows where things are."""

    def __init__(self, boxes: dict[str, list[Detection]]):
        self.boxes, self.asked = boxes, []

    def __call__(self, pictures: list[np.ndarray], keywords: list[str]) -> list[list[Detection]]:
        assert len(pictures) == len(keywords)
        self.asked += keywords
        return [self.boxes.get(keyword, []) for keyword in keywords]


def unit_of(*items: Item, regions: tuple[Region, ...] = (), number: int = 0) -> Unit:
    unit = Unit(number, "u", "p", None, len(items), list(items), {i.id: i.id for i in items}, list(regions))
    unit.picture = np.zeros((100, 200, 3), np.uint8)
    return unit


def asked(keyword: str, number: int = 0, **fields: Any) -> Item:
    return Item(id=f"{keyword}-{number}", question=f"Is there a {keyword} on the bench?", keyword=keyword, **fields)


CAT = [Detection((10, 10, 60, 60), 0.5), Detection((100, 20, 150, 90), 0.9), Detection((1, 1, 3, 3), 0.99)]


def localized(units: list[Unit], boxes: dict[str, list[Detection]], batch: int = 2, **settings: Any) -> Known:
    known = Known(boxes)
    LocalizeStage(LocalizeConfig(**settings), known, batch)(units)
    return known


def test_all_boxes_or_the_best_one():
    for several, expected in (("all", [0.9, 0.5]), ("best", [0.9]), ("union", [0.9, 0.5])):
        unit = unit_of(asked("cat"))
        localized([unit], {"cat": CAT}, several=several)
        assert [unit.regions[n].score for n in unit.items[0].regions] == expected
        assert unit.counts["boxes_dropped"] == 1  # 2 x 2 pixels
    unit = unit_of(asked("cat"))
    localized([unit], {"cat": CAT}, most=1)
    assert len(unit.regions) == 1
    assert unit.counts["boxes_beyond_most"] == 1


def test_a_keyword_is_looked_for_once_in_a_picture_and_batches_span_pictures():
    units = [unit_of(asked("cat", 1), asked("cat", 2), asked("dog", 3), number=n) for n in range(2)]
    known = localized(units, {"cat": CAT, "dog": [Detection((0, 0, 90, 90), 0.6)]}, batch=3)
    assert sorted(known.asked) == ["cat", "cat", "dog", "dog"]
    for unit in units:
        assert [item.regions for item in unit.items] == [(0, 1), (0, 1), (2,)]


@pytest.mark.parametrize(
    ("nothing", "counted"), [("reject", None), ("keep", "kept_without_object"), ("whole", "whole_picture")]
)
def test_what_happens_where_nothing_is_found(nothing, counted):
    unit = unit_of(asked("unicorn"))
    localized([unit], {}, nothing=nothing)
    if counted is None:
        assert [(r.stage, r.reason, r.detail) for r in unit.rejects] == [("localize", "no_object", "unicorn")]
        return
    assert unit.counts[counted] == 1
    (item,) = unit.items
    assert [unit.regions[n].box for n in item.regions] == ([(0, 0, 200, 100)] if nothing == "whole" else [])


def test_another_noun_is_tried_before_giving_up():
    unit = unit_of(Item(id="1", question="Is the unicorn on the bench?", keyword="unicorn"))
    known = localized([unit], {"bench": [Detection((0, 50, 100, 100), 0.7)]})
    assert known.asked == ["unicorn", "bench"]
    assert unit.items[0].keyword == "bench"
    assert unit.counts["found_on_retry"] == 1
    unit = unit_of(Item(id="1", question="Is the unicorn on the bench?", keyword="unicorn"))
    known = localized([unit], {"bench": [Detection((0, 50, 100, 100), 0.7)]}, retry=False)
    assert known.asked == ["unicorn"]
    assert [r.reason for r in unit.rejects] == ["no_object"]


@pytest.mark.parametrize("absent", ["keep", "reject", "search"])
def test_objects_that_are_known_to_be_absent(absent):
    item = asked("cat", truth="no", candidates=("yes", "no"), category="existence")
    unit = unit_of(item)
    known = localized([unit], {"cat": CAT}, absent=absent)
    assert known.asked == (["cat"] if absent == "search" else [])
    assert [r.reason for r in unit.rejects] == (["absent_object"] if absent == "reject" else [])
    if absent == "keep":
        assert unit.items[0].regions == ()


def test_given_regions_are_kept_or_searched_anew():
    region = Region("cat", (-5.0, 0.0, 300.0, 50.0))
    unit = unit_of(asked("cat", regions=(0,)), regions=(region,))
    known = localized([unit], {"cat": CAT})
    assert known.asked == []
    assert unit.regions[0].box == (0, 0, 200, 50)
    unit = unit_of(asked("cat", regions=(0,)), regions=(region,))
    known = localized([unit], {"cat": CAT}, given=False)
    assert known.asked == ["cat"]
    assert [unit.regions[n].origin for n in unit.items[0].regions] == ["detector", "detector"]


def test_without_a_detector_only_given_regions_count(tmp_path):
    done = prepared("gqa", tmp_path, localize={"nothing": "reject"})
    assert [record.items[0].keyword for record in records(done.directory)] == ["plate"]
    assert [reject["reason"] for reject in rejects(done.directory)] == ["no_object"]


def test_a_whole_run_through_a_detector(tmp_path, folder):
    """Random weights: where the boxes lie means nothing, but they come from the model and lie in the picture."""
    prep_samples.folder(tmp_path / "folder")
    settings = {"name": "grounding-dino", "checkpoint": folder, "box_threshold": 0.0, "text_threshold": 0.0}
    config = config_of(
        "folder",
        tmp_path / "folder",
        tmp_path / "out",
        localize={"detector": settings, "given": False, "least_area": 0.0},
    )
    done = prepare(config)
    found = [region for record in records(done.directory) for region in record.regions]
    assert len(found) > 2
    assert {region.keyword for region in found} == {"mug", "Tasse"}
    for region in found:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= prep_samples.WIDTH
        assert 0 <= y0 < y1 <= prep_samples.HEIGHT
        assert 0 < region.score < 1
