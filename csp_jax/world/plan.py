"""What a scene will hold, before anything is placed; and the world's own statistics of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csp_jax.world.catalogue import ObjectClass
from csp_jax.world.config import WorldConfig

# The stationary law of a walk that steps by one over 1..4: asked with the count itself (yes) and with the
# walk's next number (no), every number word is right as often as wrong.
COUNT_SHARES = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
SINGLES_BESIDE_SEVERAL = (0.05, 0.35, 0.35, 0.25)
SINGLES_ALONE = (0.0, 0.05, 0.3, 0.35, 0.2, 0.1)
MOST_OBJECTS = 5


@dataclass(frozen=True)
class Plan:
    """Class indices and counts of a scene; `counted`: place of the class with a number question, or -1."""

    classes: tuple[int, ...]
    counts: tuple[int, ...]
    counted: int
    touching: tuple[int, int] | None  # places of two single classes that shall touch

    @property
    def singles(self) -> tuple[int, ...]:
        """Places of the classes that appear once."""
        return tuple(place for place, count in enumerate(self.counts) if count == 1)


def draw(rng: np.random.Generator, cumulative: np.ndarray) -> int:
    """An index with the chances whose cumulative sum is given."""
    return min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")), len(cumulative) - 1)


class Planner:
    """Draws plans: classes grouped in themes, with unequal frequencies."""

    def __init__(self, config: WorldConfig, classes: Sequence[ObjectClass], held_out: bool):
        """`held_out`: use only classes that have cut-outs for held-out splits (else those of training)."""
        self.config = config
        self.usable = tuple(i for i, item in enumerate(classes) if item.cutouts(held_out))
        themes: dict[str, list[int]] = {}
        for index in self.usable:
            themes.setdefault(classes[index].theme, []).append(index)
        self._themes = [(np.asarray(m), self._cumulative(len(m))) for m in themes.values()]
        self._theme_choice = self._cumulative(len(self._themes), 0.5)
        self._everything = np.concatenate([members for members, _ in self._themes])
        weights = [np.diff(cumulative, prepend=0.0) for _, cumulative in self._themes]
        theme_weights = np.diff(self._theme_choice, prepend=0.0)
        self._everything_choice = np.cumsum(np.concatenate([w * t / w.sum() for w, t in zip(weights, theme_weights)]))
        self._counts = np.cumsum(COUNT_SHARES)
        self._beside, self._alone = np.cumsum(SINGLES_BESIDE_SEVERAL), np.cumsum(SINGLES_ALONE)

    def _cumulative(self, size: int, power: float = 1.0) -> np.ndarray:
        return np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** (-self.config.zipf * power))

    def plan(self, rng: np.random.Generator) -> Plan:
        """One random plan; 1 to 5 objects."""
        counts: list[int] = []
        if rng.random() < self.config.several:
            counts.append(1 + draw(rng, self._counts))
            singles = min(draw(rng, self._beside), MOST_OBJECTS - counts[0])
        else:
            singles = draw(rng, self._alone)
        counted = len(counts) - 1
        counts += [1] * min(singles, len(self.usable) - len(counts))
        classes = self._draw_classes(rng, len(counts))
        touching = self._draw_pair(rng, [p for p, count in enumerate(counts) if count == 1])
        return Plan(tuple(classes), tuple(counts), counted, touching)

    def _draw_classes(self, rng: np.random.Generator, number: int) -> list[int]:
        members, choice = self._themes[draw(rng, self._theme_choice)]
        chosen: list[int] = []
        while len(chosen) < number:
            of_theme = rng.random() < self.config.theme_share and not set(members.tolist()) <= set(chosen)
            index = members[draw(rng, choice)] if of_theme else self._everything[draw(rng, self._everything_choice)]
            if int(index) not in chosen:
                chosen.append(int(index))
        return chosen

    def _draw_pair(self, rng: np.random.Generator, singles: list[int]) -> tuple[int, int] | None:
        if len(singles) < 2 or rng.random() >= self.config.contact:
            return None
        first = int(rng.random() * len(singles))
        second = (first + 1 + int(rng.random() * (len(singles) - 1))) % len(singles)
        return singles[first], singles[second]


@dataclass(frozen=True)
class Statistics:
    """How often classes appear, and appear together, in simulated plans."""

    scenes: int
    frequency: np.ndarray  # [classes], share of scenes that hold the class
    together: np.ndarray  # [classes, classes], share of scenes that hold both; diagonal 0

    @classmethod
    def simulate(cls, planner: Planner, classes: int, scenes: int, seed: int) -> Statistics:
        """Counts over `scenes` plans drawn from `seed`."""
        rng = np.random.default_rng(seed)
        present = np.zeros((scenes, classes), np.float32)
        for row in present:
            row[list(planner.plan(rng).classes)] = 1
        together = present.T @ present / scenes
        frequency = together.diagonal().copy()
        np.fill_diagonal(together, 0)
        return cls(scenes, frequency, together)

    def popular(self, absent: Sequence[int], number: int) -> list[int]:
        """The most frequent of the absent classes, most frequent first."""
        return sorted(absent, key=lambda index: (-self.frequency[index], index))[:number]

    def adversarial(self, absent: Sequence[int], present: Sequence[int], number: int) -> list[int]:
        """The absent classes that appear most often together with the present ones, most frequent first."""
        score = self.together[list(present)].sum(0)
        return sorted(absent, key=lambda index: (-score[index], index))[:number]
