"""What a configuration says: where each kind of attention runs, what is said where it does not; clipping."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny import tiny_model

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.train.configured import check_attention, check_heads, clip_by_norm


def config(attention: str, **settings: Any) -> TrainConfig:
    values = {"model.attention": attention, "model.dtype": "bfloat16", **settings}
    return load_config(TrainConfig, None, [f"{name}={value}" for name, value in values.items()])


@pytest.mark.parametrize(
    ("attention", "runs"),
    [("xla", "cpu gpu cuda tpu"), ("pallas", "gpu cuda"), ("cudnn", "gpu cuda"), ("splash", "tpu")],
)
def test_attention_runs_where_it_is_made_for(attention, runs):
    for platform in ("cpu", "gpu", "cuda", "tpu"):
        if platform in runs.split():
            check_attention(config(attention), platform)
            continue
        with pytest.raises(UserError, match=f"this is a {platform}") as caught:
            check_attention(config(attention), platform)
        assert (caught.value.field, caught.value.value, caught.value.mend) == ("model.attention", attention, "Use xla")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.dtype": "float32"}, "half precision, not in float32"),
        ({"data.recipe.shape.samples": 4}, "cannot tell the samples of a row apart, and 4 share one"),
    ],
)
def test_cudnn_refuses_what_it_cannot_do(settings, said):
    check_attention(config("pallas", **settings), "gpu")
    with pytest.raises(UserError, match=said) as caught:
        check_attention(config("cudnn", **settings), "gpu")
    assert (caught.value.field, caught.value.value) == ("model.attention", "cudnn")
    assert "pallas" in str(caught.value.mend)


@pytest.mark.parametrize(("channels", "fits"), [(64, True), (96, True), (128, True), (136, False), (20, False)])
def test_cudnn_takes_heads_of_some_sizes(channels, fits):
    model = tiny_model(head_dim=channels)
    check_heads("pallas", model)
    if fits:
        check_heads("cudnn", model)
        return
    with pytest.raises(UserError, match=f"not of {channels}") as caught:
        check_heads("cudnn", model)
    assert caught.value.field == "model.attention"


@pytest.mark.parametrize("size", [0.0, 0.01, 0.5, 40.0])
def test_clipping_is_that_of_optax(size):
    """Below the limit nothing changes; above it the norm is the limit; what is not finite stays so."""
    generator = np.random.default_rng(0)
    gradients = {"a": size * generator.standard_normal((3, 4)), "b": [size * generator.standard_normal(5)]}
    gradients = jax.tree.map(lambda x: x.astype(np.float32), gradients)
    ours, theirs = clip_by_norm(1.0), optax.clip_by_global_norm(1.0)
    assert jax.tree.structure(ours.init(gradients)) == jax.tree.structure(theirs.init(gradients))
    (found, _), (wanted, _) = (clip.update(gradients, clip.init(gradients)) for clip in (ours, theirs))
    for a, b, before in zip(*map(jax.tree.leaves, (found, wanted, gradients))):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert a.dtype == before.dtype
        if size <= 0.01:
            np.testing.assert_array_equal(a, before)
    broken = {"a": gradients["a"].copy(), "b": gradients["b"]}
    broken["a"][0, 0] = np.nan
    assert not np.isfinite(optax.global_norm(ours.update(broken, ours.init(broken))[0]))
