"""Rewards: the truth word for word, Brier's score against scikit-learn's, sums of several, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from csp_jax.errors import UserError
from csp_jax.records import Item
from csp_jax.rewards import REWARDS
from csp_jax.rewards.interface import Said, weighted


def test_exact_is_the_truth_but_for_case_blanks_and_a_period():
    cases = {"yes": 1, " Yes. ": 1, "YES": 1, "no": 0, "yes, it is": 0, "": 0, "y": 0}
    said = [Said(Item("q", "Is it?", truth="yes"), text) for text in cases]
    assert REWARDS["exact"](said) == list(cases.values())
    assert REWARDS["exact"]([Said(Item("q", "What?", truth=""), "")]) == [0]  # an unknown truth cannot be met
    two = Item("q", "What?", truth="Two dogs.")
    assert REWARDS["exact"]([Said(two, "two  dogs"), Said(two, "two dog")]) == [1, 0]


def test_brier_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    right, percent = generator.integers(0, 2, 50), generator.integers(0, 101, 50)
    said = [Said(Item("q", "Is it?", right=int(r)), f"{p}%") for r, p in zip(right, percent)]
    assert 1 - np.mean(REWARDS["brier"](said)) == pytest.approx(brier_score_loss(right, percent / 100))
    wrong = Item("q", "Is it?", right=0)
    assert REWARDS["brier"]([Said(wrong, "I cannot say"), Said(wrong, "120%"), Said(wrong, "0%")]) == [0, 0, 1]


def test_brier_pays_for_the_probability_itself():
    """Of all percentages the one that is the share of right responses is worth most."""
    pay = {}
    for percent in range(101):
        said = [Said(Item("q", "Is it?", right=int(n < 7)), f"{percent}%") for n in range(10)]
        pay[percent] = sum(REWARDS["brier"](said))
    assert max(pay, key=lambda percent: pay[percent]) == 70


def test_several_rewards_are_weighted_and_called_once():
    calls = []

    def longest(said):
        calls.append(len(said))
        return [len(one.text) for one in said]

    said = [Said(Item("q", "Is it?", truth="yes"), text) for text in ("yes", "nope")]
    total, parts = weighted({**REWARDS, "long": longest}, {"exact": 2.0, "long": 0.5}, said)
    assert total.tolist() == [3.5, 2.0]
    assert {name: part.tolist() for name, part in parts.items()} == {"exact": [1, 0], "long": [3, 4]}
    assert calls == [2]


@pytest.mark.parametrize("found", [[1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_rewards_that_are_no_numbers_are_refused(found):
    said = [Said(Item("q", "Is it?"), text) for text in ("a", "b")]
    with pytest.raises(UserError, match="finite number") as caught:
        weighted({"mine": lambda said: found}, {"mine": 1.0}, said)
    assert caught.value.field == "reward mine"
