"""Questions of a picture are spread over rows without loss, in the number of rows that costs least."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from csp_jax.calibration.protocols import Choice, QuestionTrees
from csp_jax.data.batch import Sample, Tree
from csp_jax.data.pictures import Picture
from csp_jax.scenes import SceneTrees, all_trees, rows_of, shape_of, split_scene, trees_a_row

PROMPT = 10


def scene(*candidates: int) -> SceneTrees:
    """A scene of questions with so many candidates each."""
    questions = tuple(
        QuestionTrees(tuple(Tree([1, 2, 3], [-1, 0, 1], [(4, 2, 1.0, 0)]) for _ in range(count)), Choice((), ()), ())
        for count in candidates
    )
    picture = Picture(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool), 100.0, 0)
    sample = Sample((1,) * PROMPT, (picture,), all_trees(questions))
    return SceneTrees(None, tuple(f"q{n}" for n in range(len(candidates))), questions, sample)  # type: ignore[arg-type]


@pytest.mark.parametrize("candidates", [(2,), (2, 2, 2), (2, 5, 2, 2), (3, 3, 3, 3, 3), (7, 2)])
@pytest.mark.parametrize("trees", [1, 2, 4, 6, 100])
def test_parts_hold_every_question_once_in_order(candidates: tuple[int, ...], trees: int):
    whole = scene(*candidates)
    parts = split_scene(whole, rows_of(whole, trees))
    assert [item for part in parts for item in part.items] == list(whole.items)
    assert [tree for part in parts for tree in part.sample.groups] == list(whole.sample.groups)
    for part, following in itertools.pairwise(parts):
        assert len(part.sample.groups) + len(following.questions[0].trees) > trees  # no part was closed too early
    for part in parts:
        assert len(part.questions) == 1 or len(part.sample.groups) <= trees


@pytest.mark.parametrize("counts", [(1, 1, 1), (8, 1, 1, 1), (6, 5, 7), (3,) * 5, (20, 19, 1)])
@pytest.mark.parametrize("candidates", [2, 3])
def test_the_chosen_row_computes_fewest_tokens(counts: tuple[int, ...], candidates: int):
    scenes = [scene(*(candidates,) * count) for count in counts]

    def computed(trees: int) -> int:
        """Tokens of all rows as they are batched, those of the prompt three times."""
        parts = [part for scene in scenes for part in split_scene(scene, rows_of(scene, trees))]
        shape = shape_of([part.sample for part in parts], 1)
        return len(parts) * (3 * shape.prompt + shape.groups * shape.length)

    most = max(counts) * candidates
    assert computed(trees_a_row(scenes)) == min(computed(trees) for trees in range(candidates, most + 1))
