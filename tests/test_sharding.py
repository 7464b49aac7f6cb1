"""Meshes, who holds what, and batches on their way to the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import tiny_model

from csp_jax.config import ParallelConfig
from csp_jax.errors import UserError
from csp_jax.models.hub import flat_paths
from csp_jax.sharding import (
    AXIS_RULES,
    batch_sharding,
    leaf_spec,
    make_mesh,
    put_batch,
    rows_over_hosts,
    state_shardings,
)


def mesh(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(ParallelConfig(**sizes))


def test_one_size_takes_what_is_left():
    assert len(jax.devices()) == 8
    assert dict(mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh(data=1, fsdp=8).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    few = make_mesh(ParallelConfig(tensor=2), jax.devices()[:4])
    assert few.devices.ravel().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 3}, {"data": 4}, {"data": 0}, {"data": -2}, {"data": 8, "tensor": 2}]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="here are 8") as caught:
        mesh(**sizes)
    assert caught.value.field == "parallel"
    assert {name: caught.value.value[name] for name in sizes} == sizes


LARGE = 512


@pytest.mark.parametrize(
    ("sizes", "shape", "axes", "wanted"),
    [
        ({}, (LARGE, 64), ("embed", "mlp"), P(None, None)),
        ({"fsdp": 8}, (64, LARGE), ("embed", "mlp"), P(None, "fsdp")),
        ({"fsdp": 8}, (LARGE, 64), ("embed", "mlp"), P("fsdp", None)),
        ({"tensor": 2}, (LARGE, 64), ("embed", "mlp"), P(None, "tensor")),
        ({"tensor": 2}, (64, LARGE), ("heads", "embed"), P("tensor", None)),
        ({"fsdp": 4, "tensor": 2}, (64, LARGE), ("embed", "mlp"), P("fsdp", "tensor")),
        ({"fsdp": 4, "tensor": 2}, (1024, 64), ("vocab", "embed"), P("tensor", "fsdp")),
        # stacked layers lead and are never split
        ({"fsdp": 4, "tensor": 2}, (8, 64, LARGE), ("embed", "mlp"), P(None, "fsdp", "tensor")),
        ({"fsdp": 8}, (512, 64), ("norm",), P(None, "fsdp")),
        # what does not divide stays whole
        ({"tensor": 2}, (LARGE, 63), ("embed", "mlp"), P(None, None)),
        ({"fsdp": 8}, (257, 511), ("embed", "mlp"), P(None, None)),
        # small tensors are replicated
        ({"fsdp": 4, "tensor": 2}, (64, 64), ("embed", "mlp"), P()),
    ],
)
def test_how_a_leaf_is_split(sizes, shape, axes, wanted):
    assert leaf_spec(mesh(**sizes), shape, axes) == wanted


def test_every_parameter_has_a_place(monkeypatch):
    """Each leaf's own axes are used: no parameter of the model is left whole by mistake."""
    monkeypatch.setattr("csp_jax.sharding.SMALLEST_SHARDED", 1)
    state = nnx.state(tiny_model())
    found = flat_paths(state_shardings(mesh(fsdp=2, tensor=2), state))
    for name, leaf in flat_paths(state).items():
        spec = [axis for axis in found[name].get_value().spec if axis]
        if name.endswith((".kernel", ".embedding", ".position")):
            cut = [axis for axis in leaf.get_metadata()["axes"] if "tensor" in AXIS_RULES[axis]]
            assert sorted(spec) == ["fsdp", *(["tensor"] if cut else [])], name
            assert cut or name in ("vision.patch.kernel", "vision.position"), name


def test_rows_must_divide():
    assert rows_over_hosts(16, mesh()) == 16
    assert rows_over_hosts(4, mesh(data=2, fsdp=2, tensor=2)) == 4
    with pytest.raises(UserError, match="multiple of 8") as caught:
        rows_over_hosts(12, mesh())
    assert (caught.value.field, caught.value.value) == ("batch.rows", 12)


def test_batches_are_split_by_rows():
    over = mesh(data=2, fsdp=2, tensor=2)
    values = {"a": np.arange(2 * 8 * 3).reshape(2, 8, 3), "b": np.zeros((2, 8), np.uint8), "none": None}
    placed = put_batch(values, over)
    assert placed["none"] is None
    np.testing.assert_array_equal(placed["a"], values["a"])
    assert placed["a"].sharding == batch_sharding(over)
    assert {shard.data.shape for shard in placed["a"].addressable_shards} == {(2, 2, 3)}
    assert placed["b"].dtype == jnp.uint8
