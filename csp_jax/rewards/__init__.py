"""What a sampled answer is worth. A reward judges a whole list at once, so that one that asks others (an expert, a
server) can ask for all answers together.

`exact`  1 for the truth, word for word.
`brier`  the Brier score of the confidence that an answer states, the higher the better.
"""

from __future__ import annotations

from csp_jax.rewards.instant import brier, exact
from csp_jax.rewards.interface import Reward

REWARDS: dict[str, Reward] = {"exact": exact, "brier": brier}
