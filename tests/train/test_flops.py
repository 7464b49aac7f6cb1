"""Useful work against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tiny import SIDE, tiny_model

from csp_jax.config import TrainConfig, load_config
from csp_jax.data.batch import Shape, empty_batch
from csp_jax.losses.logprobs import score
from csp_jax.train.flops import masked_attention_flops, product_flops


def test_forward_and_backward_of_a_stack():
    """Three layers: x W forward; backward as much for x and for W, but none for the first x."""
    width, layers, rows = 32, 3, 8

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    weights, x = jnp.zeros((layers, width, width)), jnp.zeros((rows, width))
    one = 2 * rows * width * width * layers
    assert product_flops(jax.make_jaxpr(loss)(weights, x).jaxpr) == one
    assert product_flops(jax.make_jaxpr(jax.grad(loss))(weights, x).jaxpr) == 3 * one
    recomputed = jax.make_jaxpr(jax.grad(lambda w, x: jax.checkpoint(loss)(w, x)))(weights, x).jaxpr
    assert (
        product_flops(recomputed) > 3 * one
    )  # what is computed twice is counted twice: useful work is counted without


def test_the_forward_pass_of_llava():
    """Every product of the tiny model, by hand."""
    model, rows = tiny_model(), 3
    shape = Shape(rows, 12, 2, 16, 14, 5, 1, (SIDE, SIDE))
    batch = empty_batch(shape)
    pixels = jnp.zeros((rows, 1, SIDE, SIDE, 3))
    found = product_flops(jax.make_jaxpr(lambda: score(model, batch, pixels))().jaxpr)
    patches, tokens = 4, 5  # the tower's, without and with its class token
    width, inner, vision_layers = 24, 40, 2
    vision = 2 * patches * 3 * 14 * 14 * width
    vision += vision_layers * (4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * inner + 2 * 2 * tokens**2 * width)
    text, heads, keys, mlp, vocabulary = 32, 32, 16, 48, 96
    projector = 2 * patches * (width * text + text * text)
    prompt, fed, length, targets = 12, 32, 16, 28
    every = prompt + fed
    whole = 2 * every * (text * heads + 2 * text * keys + heads * text + 3 * text * mlp)
    attention = 2 * 2 * heads * (prompt**2 + fed * (prompt + length))
    last = 2 * every * 2 * text * keys + 2 * targets * (2 * text * heads + 3 * text * mlp)
    last += 2 * 2 * heads * targets * (prompt + length)
    head = 2 * targets * text * vocabulary
    assert found == rows * (vision + projector + 2 * (whole + attention) + last + head)


def test_what_causality_masks():
    config = tiny_model().decoder.config
    one_product = 2 * (12 * 11 / 2) * config.num_heads * config.head_dim
    assert masked_attention_flops(config, 3 * 4, 12) == pytest.approx(6 * one_product * 3 * 4 * (config.num_layers - 1))
    # Two samples of 6 tokens: of a prompt's 12 keys they see 1 to 6; branches and targets see 6.
    unseen = (config.num_layers - 1) * (12 * 12 - 2 * (1 + 2 + 3 + 4 + 5 + 6) + 32 * 6) + 28 * 6
    found = masked_attention_flops(config, 3 * 4, 12, samples=2, fed=32, scored=28)
    assert found == pytest.approx(6 * 2 * config.num_heads * config.head_dim * unseen * 3 * 4)


def test_the_step_of_a_configuration(tmp_path):
    """Frozen leaves have no gradient: freezing the tower takes off two thirds of its layers' work and all of what
    leads to them."""
    from csp_jax.plan.program import step_program
    from csp_jax.sharding import make_mesh
    from csp_jax.world import BASE

    settings = ["model.checkpoint=world", "batch.rows=2", "batch.accumulation=3"]
    work = {}
    for freeze in ("[]", "[vision]"):
        config = load_config(TrainConfig, None, [*settings, f"model.freeze={freeze}"])
        program = step_program(config, BASE, make_mesh(config.parallel, jax.devices()[:1]))
        work[freeze] = program.useful_flops()
        sizes = program.bytes_a_device()
        trained = sum(leaf.size for leaf in jax.tree.leaves(program.state.trainable))
        assert sizes["optimizer"] == pytest.approx(8 * trained, abs=16)  # two moments, and a few counts
        assert sizes["parameters"] == 4 * program.parameters()
    assert 0.3 * work["[]"] < work["[vision]"] < work["[]"]
