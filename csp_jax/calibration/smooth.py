"""Calibration errors without equal-width bins, over gathered arrays: equal-mass (adaptive) and smooth ECE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from csp_jax.calibration.binning import probabilities
from csp_jax.calibration.metrics import Array, masked, ratio, weights
from csp_jax.calibration.ranking import running_sum, tie_groups

_BLOCK = 4096


def equal_mass_ece(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    *,
    bins: int = 10,
) -> Float[jax.Array, ""]:
    """ECE over bins of equal weight (adaptive ECE, Nguyen & O'Connor 2015).

    An example belongs to bin floor(bins x mid-rank / n), so equal confidences share a bin and the order of
    the rows does not matter; with many ties the bins are only as equal as the ties allow.
    """
    weight = weights(weight, confidence)
    groups = tie_groups(confidence)
    share = ratio(weight, weight.sum())
    counts = running_sum(weight, groups)
    # From whole counts, so that rounding cannot move an example over a border.
    middle = ratio(counts[groups.start] + counts[groups.end], 2 * counts[-1])
    index = jnp.clip(jnp.floor(bins * middle * (1 + 1e-6)), 0, bins - 1)
    error = share * (masked(probabilities(confidence), weight) - masked(correct, weight))
    member = index[:, None] == jnp.arange(bins)
    return jnp.abs(jnp.where(member, error[:, None], 0).sum(0)).sum()


def _cosine_coefficients(
    position: Float[jax.Array, " n"], mass: Float[jax.Array, " n"], frequencies: int
) -> Float[jax.Array, " frequencies"]:
    """Sum over examples of mass x cos(pi k position) for k = 0, 1, ..., in blocks of examples."""
    size = position.shape[0]
    block = min(size, _BLOCK)
    padding = -size % block
    rows = jnp.pad(position, (0, padding)).reshape(-1, block)
    masses = jnp.pad(mass, (0, padding)).reshape(-1, block)
    k = jnp.arange(frequencies, dtype=jnp.float32)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        waves = jnp.cos(jnp.pi * ((part[0][:, None] * k) % 2))
        return total + jnp.matmul(part[1], waves, precision="highest"), None

    return jax.lax.scan(add, jnp.zeros(frequencies, jnp.float32), (rows, masses))[0]


def smooth_ece(
    confidence: Shaped[Array, " n"],
    correct: Shaped[Array, " n"],
    weight: Float[Array, " n"] | None = None,
    *,
    frequencies: int = 512,
    steps: int = 20,
) -> Float[jax.Array, ""]:
    """smECE: the s at which the calibration error smoothed with bandwidth s is s (Blasiok & Nakkiran 2023).

    error(s) = integral over t in [0, 1] of |mean (y - p) K_s(t, p)|, K_s a Gaussian reflected at 0 and 1.
    It is diagonal in cosines, K_s(t, p) = 1 + 2 sum_k exp(-(pi k s)^2 / 2) cos(pi k t) cos(pi k p), so no
    confidence is rounded to a grid and one Fourier transform gives the integrand at 2 x `frequencies` + 1
    points. Bandwidths above about 2 / `frequencies` are resolved. `steps` halvings of [0, 1] find the fixed
    point: error falls with s, so there is one.
    """
    weight = weights(weight, confidence)
    probability = probabilities(confidence)
    mass = ratio(weight, weight.sum()) * masked(correct - probability, weight)
    # Positions free of the weights, so that many weightings share the cosines.
    coefficients = _cosine_coefficients(jnp.nan_to_num(probability), mass, frequencies)
    k = jnp.arange(frequencies)
    period = 4 * frequencies

    def error(scale: jax.Array) -> jax.Array:
        damped = coefficients * jnp.exp(-0.5 * (jnp.pi * k * scale) ** 2)
        # The reflected function repeats with period 2: its mean over a period is its integral over [0, 1].
        return jnp.abs(jnp.fft.irfft(damped, period) * period).mean()

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        above = error(middle) > middle
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (jnp.float32(0), jnp.float32(1)))
    return jnp.where(weight.sum() > 0, 0.5 * (low + high), jnp.nan)
