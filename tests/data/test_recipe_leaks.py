"""Under `evidence`, the buried region alone must tell neither what was there nor which answer is true.

A classifier that sees the region (its outline, its place, its pixels at 0%) guesses, in cross-validation over
scenes; it must stay within chance. What it does find out about outlines shows that it could.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from recipe_reader import Reader, box_mask, items_of, object_masks, only_picture
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from csp_jax.perturb import Schedule, perturb
from csp_jax.records import Item

SCENES = 2500
CELLS = 8

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")]


@dataclasses.dataclass(frozen=True)
class Buried:
    """A scene's region, as the classifier sees it, and what was asked beside it."""

    scene: int
    outline: np.ndarray
    content: np.ndarray
    keyword: str  # of the object that lies under it, empty: none does
    asked: tuple[tuple[Item, bool], ...]  # and whether the region took anything from the label


def outline(mask: np.ndarray) -> np.ndarray:
    """Place, size and shape of a region: its box, its outline within the box, its cover of the picture."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    place = ((np.arange(CELLS) + 0.5) / CELLS * side for side in (height, width))
    down, along = (values.astype(int) for values in place)
    shape = mask[top:bottom, left:right][down][:, along]
    cover = mask.reshape(CELLS, -1, CELLS, mask.shape[1] // CELLS).mean(axis=(1, 3))
    box = [top, left, bottom, right, height, width, height * width, mask.sum(), np.log(height / width)]
    return np.concatenate([box, shape.ravel(), cover.ravel()]).astype(np.float32)


def content(canvas: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean and spread of the region's pixels, and its colours on a grid of four by four."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    patch = np.where(mask[..., None], canvas, 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    parts = [part for band in np.array_split(patch, 4, axis=0) for part in np.array_split(band, 4, axis=1)]
    colours = [part.mean(axis=(0, 1)) if part.size else np.zeros(3) for part in parts]
    inside = canvas[mask]
    return np.concatenate([inside.mean(axis=0), inside.std(axis=0), *colours]).astype(np.float32)


def bury_wholly(canvases: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The pictures at 0%, under the schedule that the shipped configurations of `evidence` use."""
    count = len(canvases)
    arrays = (canvases[:, None], masks[:, None], np.zeros((count, 1), np.float32))
    identities = np.arange(count, dtype=np.uint32)[:, None]
    run = jax.jit(perturb, static_argnums=5)
    return np.asarray(run(*arrays, identities, jax.random.key(0), Schedule("linear")))[:, 0]


def draw_scenes(reader: Reader, region: str, scenes: int) -> list[Buried]:
    recipe = reader.recipe("evidence", items=5, clean=0.0, region=region, labels="grid")
    drawn = [(scene, reader.draw(recipe, scene).sample) for scene in range(scenes)]
    kept = [(scene, sample) for scene, sample in drawn if only_picture(sample).confidence < 100]
    pictures = [only_picture(sample) for _, sample in kept]
    noised = bury_wholly(np.stack([p.canvas for p in pictures]), np.stack([p.mask for p in pictures]))
    found = []
    for (scene, sample), picture, pixels in zip(kept, pictures, noised, strict=True):
        record = reader.record(scene)
        shapes = object_masks(record) if region == "mask" else [box_mask(record, i) for i in range(len(record.regions))]
        under = {
            r.keyword
            for r, shape in zip(record.regions, shapes, strict=True)
            if (shape & picture.mask).sum() >= 0.9 * shape.sum()
        }
        items, asked = items_of(record), {}
        for query in reader.asked(recipe, sample):
            asked[query.question] = (items[query.question], query.percent not in (0, 100))
        keyword = under.pop() if len(under) == 1 else ""
        found.append(Buried(scene, outline(picture.mask), content(pixels, picture.mask), keyword, (*asked.values(),)))
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("leaks"))


@pytest.fixture(scope="module")
def squares(reader: Reader) -> list[Buried]:
    return draw_scenes(reader, "square", SCENES)


@pytest.fixture(scope="module")
def masks(reader: Reader) -> list[Buried]:
    return draw_scenes(reader, "mask", SCENES // 2)


def linear() -> ClassifierMixin:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))


def boosted() -> ClassifierMixin:
    return HistGradientBoostingClassifier(max_depth=4, max_iter=60, random_state=0)


def advantage(model: ClassifierMixin, seen: Any, wanted: Any, scenes: Any) -> float:
    """How far cross-validated accuracy lies above the best constant guess, in standard errors over scenes."""
    seen, wanted, scenes = np.asarray(seen), np.asarray(wanted), np.asarray(scenes)
    guess = cross_val_predict(model, seen, wanted, groups=scenes, cv=GroupKFold(5))
    chance = max(collections.Counter(wanted.tolist()).values()) / len(wanted)
    error = (chance * (1 - chance) / len(np.unique(scenes))) ** 0.5
    return float(((guess == wanted).mean() - chance) / error)


def everything(scene: Buried) -> np.ndarray:
    return np.concatenate([scene.outline, scene.content])


@pytest.mark.parametrize("model", [linear, boosted])
@pytest.mark.parametrize("affected", [False, True], ids=["all", "affected"])
def test_the_region_does_not_tell_the_truth(squares, model, affected):
    """Over all that is asked, and over the questions whose label the region lowers."""
    rows = [
        (everything(scene), item.truth == "yes", scene.scene)
        for scene in squares
        for item, touched in scene.asked
        if touched or not affected
    ]
    assert len(rows) > 4000
    assert advantage(model(), *zip(*rows)) < 3.5


@pytest.mark.parametrize("model", [linear, boosted])
def test_noise_does_not_say_that_something_is_there(squares, model):
    """Existence questions whose label the region lowers: about an object under it, or about one that is nowhere."""
    rows = [
        (everything(scene), item.truth == "yes", scene.scene)
        for scene in squares
        for item, touched in scene.asked
        if touched and item.category == "existence"
    ]
    assert len(rows) > 2000
    assert advantage(model(), *zip(*rows)) < 3.5


def keyword_rows(scenes: list[Buried], seen: Any) -> tuple[Any, ...]:
    counts = collections.Counter(scene.keyword for scene in scenes if scene.keyword)
    common = {keyword for keyword, _ in counts.most_common(12)}
    rows = [(seen(scene), scene.keyword, scene.scene) for scene in scenes if scene.keyword in common]
    assert len(rows) > 200
    return tuple(zip(*rows))


def test_a_square_does_not_say_what_is_in_it(squares):
    assert advantage(boosted(), *keyword_rows(squares, lambda scene: scene.outline)) < 3.5


@pytest.mark.parametrize("model", [linear, boosted])
def test_pixels_at_0_percent_do_not_say_what_was_there(squares, model):
    assert advantage(model(), *keyword_rows(squares, lambda scene: scene.content)) < 3.5


def test_an_outline_does(masks):
    """Even to a linear classifier: why `evidence` is to bury squares."""
    assert advantage(linear(), *keyword_rows(masks, lambda scene: scene.outline)) > 8


def given_question(scenes: list[Buried], categories: tuple[str, ...]) -> tuple[Any, ...]:
    """The outline together with what the question asks for: its kind, a number, or large against small."""
    rows = []
    for scene in scenes:
        for item, touched in scene.asked:
            if touched and item.category in categories:
                words = [item.question.find(f" {word} ") >= 0 for word in ("one", "two", "three", "four", "large")]
                kind = [item.category == category for category in categories]
                rows.append((np.concatenate([scene.outline, words, kind]), item.truth == "yes", scene.scene))
    return tuple(zip(*rows))


@pytest.mark.parametrize("categories", [("existence",), ("left_of", "above")], ids="-".join)
def test_the_region_does_not_answer_its_question(squares, categories):
    """Who knows the question beside the region should know no more than that."""
    assert advantage(boosted(), *given_question(squares, categories)) < 3.5


def test_squares_do_tell_size_number_and_contact(squares):
    """They are as large, as many and as close to each other as what is under them: known, and said in the docs."""
    assert advantage(boosted(), *given_question(squares, ("size", "number", "contact"))) > 3.5
