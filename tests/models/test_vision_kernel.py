"""A tower whose patches attend by the kernel (interpreted): the features and gradients of the dense one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import CELL, family_model

from csp_jax.models.attention import segment_span

pytestmark = pytest.mark.usefixtures("exact")


def test_spans_are_segments():
    """Two segments, padding between them and behind."""
    span = segment_span(jnp.array([[1, 1, 1, 0, 2, 2, 0]]), "pallas")
    assert span.first.tolist() == [[0, 0, 0, 1, 4, 4, 1]]
    assert span.last.tolist() == [[2, 2, 2, 0, 5, 5, 0]]


@pytest.mark.slow
def test_pictures_of_a_row_as_densely_attended():
    """One row with two pictures and padding, one with a single smaller one."""
    generator = np.random.default_rng(0)
    models = {how: family_model("qwen2_vl") for how in ("xla", "pallas_interpret")}
    for how, model in models.items():
        model.attention = how
    side, count = CELL["qwen2_vl"], 10
    grid = jnp.array([[[2, 3], [1, 2]], [[2, 2], [0, 0]]])
    used = np.arange(count) < np.array([[8], [4]])
    pixels = jnp.asarray(generator.normal(size=(2, count, side, side, 3)), jnp.float32)
    width = models["xla"].decoder.config.hidden_size
    weight = jnp.asarray(generator.normal(size=(2, count, width)) * used[..., None])

    def features(pixels: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
        found = models[how].encode_images(pixels, grid)
        return jnp.sum(found * weight), found

    (_, dense), dense_gradient = jax.value_and_grad(features, has_aux=True)(pixels, "xla")
    (_, kernel), kernel_gradient = jax.value_and_grad(features, has_aux=True)(pixels, "pallas_interpret")
    np.testing.assert_allclose(kernel[used], dense[used], atol=2e-5)
    np.testing.assert_allclose(kernel_gradient, dense_gradient, atol=2e-5 * float(jnp.abs(dense_gradient).max()))
    other = features(pixels.at[0, 7].add(1.0), "pallas_interpret")[1]  # of the second picture
    np.testing.assert_array_equal(other[0, :6], kernel[0, :6])
    assert np.abs(other[0, 6] - kernel[0, 6]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kernel"),
    [(family, "pallas_interpret") for family in ("llava", "internvl2", "phi3_vision", "qwen_vl")]
    + [("llava", "splash_interpret")],
)
def test_cells_as_densely_attended(family, kernel):
    """Towers that see each cell apart: no patch beyond a cell's own, none of the kernel's padding."""
    generator = np.random.default_rng(0)
    models = {how: family_model(family) for how in ("xla", kernel, "pallas")}
    for how, model in models.items():
        model.attention = how
    grid = jnp.array([[[1, 2]], [[2, 1]]])
    pixels = jnp.asarray(generator.normal(size=(2, 3, CELL[family], CELL[family], 3)), jnp.float32)

    def features(pixels: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
        found = models[how].encode_images(pixels, grid)
        return jnp.sum(jnp.square(found)), found

    (_, dense), dense_gradient = jax.value_and_grad(features, has_aux=True)(pixels, "xla")
    (_, sparse), sparse_gradient = jax.value_and_grad(features, has_aux=True)(pixels, kernel)
    np.testing.assert_allclose(sparse, dense, atol=2e-5 * float(jnp.abs(dense).max()))
    largest = float(jnp.abs(dense_gradient).max())
    assert largest > 0
    np.testing.assert_allclose(sparse_gradient, dense_gradient, atol=2e-5 * largest)
    assert "pallas_call" in str(jax.make_jaxpr(lambda pixels: features(pixels, "pallas")[1])(pixels))
