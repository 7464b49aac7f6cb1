"""A library's attention for prompts that have a row each: what it is told, what it must not read, and on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csp_jax.models.attention import attend, attend_alone, interval_mask, prompt_interval

SIZE, HEADS, KV_HEADS, DIM = 24, 4, 2, 16
LENGTHS = (24, 9, 1, 0)


def gpu() -> jax.Device | None:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


def tokens(seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values, and weights for a loss."""
    random = np.random.default_rng(seed)
    shapes = [(len(LENGTHS), SIZE, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def segments(*rows: list[int]) -> jax.Array:
    return jnp.array([row + [0] * (SIZE - len(row)) for row in rows])


ALONE = segments(*([1] * length for length in LENGTHS))


def first_keys(segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    index = jnp.broadcast_to(jnp.arange(SIZE), segment.shape)
    return prompt_interval(segment, index)


@pytest.mark.usefixtures("exact")
def test_lengths_say_what_the_mask_says():
    """Values and gradients, ragged and empty rows; what pads is zero and changes nothing."""
    q, k, v, weights = tokens()
    first, last = first_keys(ALONE)
    mask = interval_mask(first, last, SIZE)

    def by_mask(q, k, v):
        out = attend(q, k, v, mask)
        return (out * weights).sum(), out

    def by_length(q, k, v):
        out = attend_alone(q, k, v, first, "xla")
        return (out * weights).sum(), out

    (_, wanted), wanted_gradients = jax.value_and_grad(by_mask, (0, 1, 2), has_aux=True)(q, k, v)
    (_, found), gradients = jax.value_and_grad(by_length, (0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    padding = np.asarray(ALONE == 0)
    assert not np.asarray(found)[padding].any()
    garbage = [np.where(padding[..., None, None], 1e3, x).astype(np.float32) for x in (q, k, v)]
    np.testing.assert_array_equal(attend_alone(*garbage, first, "xla"), found)


@pytest.mark.parametrize(
    "row", [[1] * 5 + [2] * 3, [0] * 3 + [1] * 8, [1] * 4 + [0] * 2 + [1] * 4], ids=["packed", "left", "hole"]
)
def test_other_rows_are_not_numbers(row):
    """Neither two prompts in a row nor padding before one can be said in lengths; the other rows stay as they are."""
    q, k, v, _ = tokens()
    segment = segments([1] * 24, row, [1], [])
    found = np.asarray(attend_alone(q, k, v, first_keys(segment)[0], "xla"))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.skipif(gpu() is None, reason="cuDNN runs on NVIDIA GPUs alone, and there is none here")
def test_cudnn_attends_as_xla_does():
    """In bfloat16, within its rounding: values and gradients of ragged rows."""
    q, k, v, weights = (jax.device_put(jnp.asarray(x, jnp.bfloat16), gpu()) for x in tokens())
    first, _ = first_keys(jax.device_put(ALONE, gpu()))

    def loss(q, k, v, implementation):
        out = attend_alone(q, k, v, first, implementation)
        return (out * weights).astype(jnp.float32).sum(), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    ((_, found), gradients), ((_, wanted), wanted_gradients) = (both(q, k, v, how) for how in ("cudnn", "xla"))
    for one, other in zip((found, *gradients), (wanted, *wanted_gradients), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, other)), atol=5e-2)
