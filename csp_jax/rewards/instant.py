"""Rewards that need nothing but the record."""

from __future__ import annotations

from collections.abc import Sequence

from csp_jax.rewards.interface import Said
from csp_jax.text import parse_confidence, plain


def exact(said: Sequence[Said]) -> list[float]:
    """1 where the answer is the item's truth (but for case, blanks and a final period), else 0."""
    return [float(bool(one.item.truth) and plain(one.text) == plain(one.item.truth)) for one in said]


def brier(said: Sequence[Said]) -> list[float]:
    """`1 - (p - right)^2` of the confidence p that an answer states in the item's response; 0 where it states none.

    A proper scoring rule: expected reward is highest where p is the probability that the response is right.
    """
    found = []
    for one in said:
        p = parse_confidence(one.text)
        found.append(0.0 if p is None else 1 - (p - float(one.item.right == 1)) ** 2)
    return found
