"""Held-out scenes show backgrounds that training scenes never do."""

from __future__ import annotations

import numpy as np
import pytest

from csp_jax.world import World, WorldConfig
from csp_jax.world.backgrounds import HELD_OUT_KINDS, TRAIN_KINDS, ProceduralBackgrounds


class Noted(ProceduralBackgrounds):
    """Writes down which kinds are painted."""

    def __init__(self, canvas: int):
        super().__init__(canvas)
        self.kinds: list[str] = []

    def paint_kind(self, kind: str, rng: np.random.Generator) -> np.ndarray:
        self.kinds.append(kind)
        return super().paint_kind(kind, rng)


@pytest.mark.parametrize(
    ("splits", "kinds"), [(("base", "train"), TRAIN_KINDS), (("validation", "test"), HELD_OUT_KINDS)]
)
def test_each_split_shows_its_own_kinds(splits, kinds):
    world = World(WorldConfig(statistics_scenes=100))
    world.backgrounds = noted = Noted(80)
    for split in splits:
        for index in range(100):
            world.scene(split, index)
    assert set(noted.kinds) == set(kinds)


def test_no_kind_is_in_both():
    assert not set(TRAIN_KINDS) & set(HELD_OUT_KINDS)


@pytest.mark.parametrize("kind", [*TRAIN_KINDS, *HELD_OUT_KINDS])
@pytest.mark.parametrize("canvas", [80, 131])
def test_kinds_are_pictures_that_differ_from_draw_to_draw(kind, canvas):
    painter = ProceduralBackgrounds(canvas)
    first, second = (painter.paint_kind(kind, np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape == (canvas, canvas, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()
    colours = len(np.unique(first.reshape(-1, 3), axis=0))
    assert colours == 1 if kind == "plain" else colours >= 2
