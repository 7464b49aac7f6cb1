"""What a reward is: numbers for answers, all answers of a rollout in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from csp_jax.errors import UserError
from csp_jax.records import Item


@dataclasses.dataclass(frozen=True)
class Said:
    """A sampled answer: to which item, about which pictures (encoded), in which words, and whether it came to its end.

    Of a confidence query, `item.response` is the response that was asked about, `item.right` whether that is right.
    """

    item: Item
    text: str
    ended: bool = True
    images: tuple[bytes, ...] = ()


class Reward(Protocol):
    """A researcher's reward implements this one."""

    def __call__(self, said: Sequence[Said]) -> Sequence[float]:
        """The reward of each answer, in this order; finite numbers."""


def weighted(
    rewards: Mapping[str, Reward], weights: Mapping[Any, float], said: Sequence[Said]
) -> tuple[Float[np.ndarray, " answers"], dict[str, Float[np.ndarray, " answers"]]]:
    """The weighted sum of several rewards, and each by itself.

    UserError: a reward that is not a finite number for each answer.
    """
    parts = {}
    for name in weights:
        found = np.asarray(rewards[name](said), np.float64)
        if found.shape != (len(said),) or not np.isfinite(found).all():
            mend = "A reward gives a finite number for each answer"
            raise UserError(f"{len(said)} answers got {found.tolist()!r:.80}", field=f"reward {name}", mend=mend)
        parts[name] = found
    return sum((weights[name] * part for name, part in parts.items()), np.zeros(len(said))), parts
