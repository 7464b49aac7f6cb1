"""Sequences that share a prompt's keys have one rotary regime: in what recipes draw and in what is evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recipe_reader import Reader

from csp_jax.calibration.protocols import Choice, QuestionTrees
from csp_jax.data.batch import PLAIN, Branch, Sample, merge_branches
from csp_jax.scenes import SceneTrees, depth, split_by_regime


class Boundary:
    """A family whose frequencies change beyond a length."""

    def __init__(self, length: int):
        self.length = length

    def regime(self, length: int, *, train: bool = False) -> float:
        return float(length > self.length)


def branch(count: int) -> Branch:
    return Branch(tuple(range(5, 5 + count)), (0.0,) * (count - 1) + (1.0,), PLAIN)


def test_depth_is_the_longest_branch():
    for counts in ((3,), (1,), (2, 7, 4)):
        assert depth(merge_branches([branch(count) for count in counts])) == max(counts)


@pytest.mark.parametrize(("boundary", "wanted"), [(100, [[0, 1, 2]]), (12, [[0, 2], [1]]), (11, [[0], [1, 2]])])
def test_a_scene_is_split_where_its_questions_straddle(boundary, wanted):
    trees = [merge_branches([branch(count)]) for count in (1, 5, 2)]
    empty = Choice((), ())
    questions = tuple(QuestionTrees((tree,), empty, ()) for tree in trees)
    scene = SceneTrees(None, ("a", "b", "c"), questions, Sample((1,) * 10, (), tuple(trees)))  # type: ignore[arg-type]
    parts = split_by_regime(Boundary(boundary), scene)  # type: ignore[arg-type]
    assert [[("a", "b", "c").index(name) for name in part.items] for part in parts] == wanted
    for part, numbers in zip(parts, wanted, strict=True):
        assert part.sample.groups == tuple(trees[number] for number in numbers)
        assert part.questions == tuple(questions[number] for number in numbers)
        assert part.sample.prompt == scene.sample.prompt


def test_recipes_keep_the_commonest_regime_and_count_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = Reader(tmp_path)
    recipe = reader.recipe("answers")

    def lengths() -> tuple[list[int], dict[str, int]]:
        drawn = recipe(reader.record(0), np.random.default_rng(1))
        sample = drawn.sample
        assert sample is not None
        found = [len(sample.prompt) + len(b.tokens) for group in sample.groups for b in group]
        return sorted(found), dict(drawn.counts)

    every, counts = lengths()
    assert "bundles_of_another_regime" not in counts
    for boundary in (every[0], every[-1] - 1):
        monkeypatch.setattr(recipe.family, "regime", Boundary(boundary).regime)
        kept, counts = lengths()
        sides = [[n for n in every if n <= boundary], [n for n in every if n > boundary]]
        assert all(sides)
        assert kept == max(sides, key=len)
        assert counts["bundles_of_another_regime"] == len(every) - len(kept)
