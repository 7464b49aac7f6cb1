"""What a loss is: sums over a batch, and the counts that divide them.

The step adds counts over the whole accumulation window first and then differentiates
`sum_i coefficient_i * sum_i / count_i` micro-batch by micro-batch, so accumulated equals full batch exactly.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float

from csp_jax.data.batch import Batch

Terms = dict[str, Array]


class Loss(Protocol):
    """A researcher's loss implements these three."""

    @property
    def coefficients(self) -> dict[str, float]:
        """Weight of each term in the objective; terms that are only reported have 0."""

    def counts(self, batch: Batch) -> Terms:
        """Denominator of each term, from the data alone."""

    def sums(self, log_probs: Float[Array, "batch targets"], batch: Batch) -> Terms:
        """Numerator of each term."""
