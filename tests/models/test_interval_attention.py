"""The GPU and the TPU kernel, interpreted, against torch: values, log-sum-exp, gradients, isolation, merging."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from csp_jax.config import ParallelConfig
from csp_jax.models.interval_attention import NOTHING, interval_attention, merge
from csp_jax.models.splash import splash_attention
from csp_jax.sharding import make_mesh, split_kernel

pytestmark = pytest.mark.usefixtures("exact")

KERNELS = {
    "pallas": functools.partial(interval_attention, block_queries=16, block_keys=16, interpret=True),
    "splash": functools.partial(splash_attention, interpret=True),
}
SHAPES = {
    "ragged": (2, 21, 37, 2, 2, 16),
    "grouped heads": (1, 32, 48, 6, 2, 24),
    "one key head": (1, 9, 20, 4, 1, 8),
    "few keys": (2, 40, 3, 2, 2, 32),
    "several blocks": (1, 300, 600, 2, 1, 8),  # of the TPU kernel's
}


@pytest.fixture(params=KERNELS)
def kernel(request) -> Callable:
    return KERNELS[request.param]


def inputs(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Queries, keys, values, random intervals (every fifth is empty), and weights for a loss."""
    batch, queries, keys, heads, kv_heads, dim = shape
    random = np.random.default_rng(seed)
    ends = np.sort(random.integers(0, keys, (batch, queries, 2)), axis=-1)
    ends[:, ::5] = (1, 0)
    return {
        "q": random.normal(size=(batch, queries, heads, dim)).astype(np.float32),
        "k": random.normal(size=(batch, keys, kv_heads, dim)).astype(np.float32),
        "v": random.normal(size=(batch, keys, kv_heads, dim)).astype(np.float32),
        "first": ends[..., 0],
        "last": ends[..., 1],
        "of_out": random.normal(size=(batch, queries, heads, dim)).astype(np.float32),
        "of_lse": random.normal(size=(batch, queries, heads)).astype(np.float32),
    }


def in_torch(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same in torch, in double precision, with a dense mask; gradients by its autograd."""
    q, k, v = (torch.tensor(given[name], dtype=torch.float64, requires_grad=True) for name in "qkv")
    repeat = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x in (k, v))
    index = torch.arange(k.shape[1])
    first, last = torch.tensor(given["first"])[:, None, :, None], torch.tensor(given["last"])[:, None, :, None]
    seen = (first <= index) & (index <= last)
    some = seen.any(-1, keepdim=True)
    attended = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen | ~some)
    logits = torch.einsum("bqhd,bhkd->bhqk", q, keys) * q.shape[-1] ** -0.5
    lse = torch.where(seen | ~some, logits, -torch.inf).logsumexp(-1)
    out, lse = torch.where(some, attended, 0).transpose(1, 2), torch.where(some[..., 0], lse, 0).transpose(1, 2)
    ((out * torch.tensor(given["of_out"])).sum() + (lse * torch.tensor(given["of_lse"])).sum()).backward()
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: value.detach().numpy() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_torchs(kernel, name):
    given = inputs(SHAPES[name])

    def loss(q, k, v):
        out, lse = kernel(q, k, v, given["first"], given["last"])
        some = jnp.where(lse > NOTHING / 2, lse, 0.0)
        return (out * given["of_out"]).sum() + (some * given["of_lse"]).sum(), (out, some)

    arrays = (given["q"], given["k"], given["v"])
    (_, (out, lse)), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    wanted = in_torch(given)
    for found, key in zip((out, lse, *gradients), ("out", "lse", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(found, wanted[key], atol=2e-5, err_msg=key)


def test_what_an_interval_leaves_out_changes_nothing(kernel):
    given = inputs(SHAPES["ragged"])
    out, lse = kernel(*(given[name] for name in ("q", "k", "v", "first", "last")))
    seen = (given["first"][0, :, None] <= np.arange(37)) & (np.arange(37) <= given["last"][0, :, None])
    for key in (0, 15, 16, 36):
        k, v = given["k"].copy(), given["v"].copy()
        k[0, key], v[0, key] = 1e3, -1e3
        moved, moved_lse = kernel(given["q"], k, v, given["first"], given["last"])
        np.testing.assert_array_equal(moved[0][~seen[:, key]], out[0][~seen[:, key]])
        np.testing.assert_array_equal(moved_lse[0][~seen[:, key]], lse[0][~seen[:, key]])
        assert not np.isclose(moved[0][seen[:, key]], out[0][seen[:, key]]).all(axis=(1, 2)).any()
        np.testing.assert_array_equal(moved[1], out[1])


def test_a_query_that_sees_nothing_gives_zeros(kernel):
    given = inputs(SHAPES["ragged"])
    out, lse = kernel(given["q"], given["k"], given["v"], given["first"], given["first"] - 1)
    assert not out.any()
    assert (lse == NOTHING).all()


def test_merged_parts_are_one_attention(kernel):
    """Keys in two parts, intervals that lie in both, in one, in none; gradients through the log-sum-exp."""
    given = inputs((2, 24, 40, 4, 2, 16), seed=1)
    first, last, cut = given["first"], given["last"], 18

    def whole(q, k, v):
        return (kernel(q, k, v, first, last)[0] * given["of_out"]).sum()

    def parts(q, k, v):
        left = kernel(q, k[:, :cut], v[:, :cut], first, np.minimum(last, cut - 1))
        right = kernel(q, k[:, cut:], v[:, cut:], np.maximum(first - cut, 0), last - cut)
        return (merge((left, right)) * given["of_out"]).sum()

    arrays = (given["q"], given["k"], given["v"])
    wanted, found = (jax.value_and_grad(f, argnums=(0, 1, 2))(*arrays) for f in (whole, parts))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_half_precision_keeps_float32_sums(kernel):
    given = inputs(SHAPES["ragged"])
    half = {name: given[name].astype(jnp.bfloat16) for name in "qkv"}
    out, lse = kernel(half["q"], half["k"], half["v"], given["first"], given["last"])
    rounded = given | {name: half[name].astype(np.float32) for name in "qkv"}
    wanted = in_torch(rounded)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted["out"], atol=2e-2)
    np.testing.assert_allclose(np.where(lse > NOTHING / 2, lse, 0), wanted["lse"], atol=1e-5)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 2, 2), (1, 8, 1), (4, 1, 2)])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_devices_attend_for_their_rows_and_heads(kernel, data, fsdp, tensor, kv_heads):
    """Over a mesh as without one; nothing of the keys or of the queries is sent."""
    given = inputs((8, 16, 32, 4, kv_heads, 16))
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor))

    def loss(q, k, v):
        out, lse = split_kernel(kernel, kv_heads)(q, k, v, given["first"], given["last"])
        return (out * given["of_out"]).sum() + (jnp.where(lse > NOTHING / 2, lse, 0.0) * given["of_lse"]).sum()

    def on_mesh(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    arrays = tuple(given[name] for name in "qkv")
    heads = [None if name != "q" and kv_heads < tensor else "tensor" for name in "qkv"]
    places = tuple(NamedSharding(mesh, P(("data", "fsdp"), None, axis)) for axis in heads)
    compiled = jax.jit(on_mesh, in_shardings=places, out_shardings=(None, places)).lower(*arrays).compile()
    wanted = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    found = compiled(*(jax.device_put(array, place) for array, place in zip(arrays, places, strict=True)))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    if kv_heads >= tensor:
        assert not any(sent in compiled.as_text() for sent in ("all-gather(", "all-to-all(", "collective-permute("))
