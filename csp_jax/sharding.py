"""Meshes and who holds what: one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csp_jax.config import ParallelConfig
from csp_jax.errors import UserError

Body = Callable[[Any, Any], tuple[Any, Any]]  # of a scan: (carry, slice) -> (carry, out)
Wrapper = Callable[[Body], Body]
AXES = ("data", "fsdp", "tensor")

# The one table: which mesh axes may split each logical axis. `tensor` takes the first axis that allows it, `fsdp` the
# largest of the others; stacked layers have no logical axis and are never split.
AXIS_RULES: dict[str, tuple[str, ...]] = {
    "heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
    "embed": ("fsdp",),
    "patch": ("fsdp",),
    "position": ("fsdp",),
    "norm": ("fsdp",),
    "rank": (),  # of an adapter: every device has all of it
    "rows": ("data", "fsdp"),  # of a batch, and of activations
}
SMALLEST_SHARDED = 1 << 14  # values; smaller tensors are replicated


def make_mesh(config: ParallelConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor`; one size may be -1 and takes what is left of the devices."""
    devices = devices or jax.devices()
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes[0] == -1:
        sizes[0] = max(len(devices) // (sizes[1] * sizes[2]), 1)
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"the mesh needs {int(np.prod(sizes))} devices, here are {len(devices)}",
            field="parallel",
            value=dict(zip(AXES, sizes)),
            mend="data x fsdp x tensor must be the number of devices; data: -1 takes what is left",
        )
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_spec(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> P:
    """How a parameter is split, by `AXIS_RULES`; what does not divide and what is small stays whole."""
    spec: list[str | None] = [None] * len(shape)
    if int(np.prod(shape)) < SMALLEST_SHARDED:
        return P()
    lead = len(shape) - len(axes)

    def free(mesh_axis: str) -> list[int]:
        allowed = [lead + place for place, axis in enumerate(axes) if mesh_axis in AXIS_RULES[axis]]
        size = mesh.shape[mesh_axis]
        return [place for place in allowed if spec[place] is None and size > 1 and shape[place] % size == 0]

    if places := free("tensor"):
        spec[places[0]] = "tensor"
    if places := free("fsdp"):
        spec[max(places, key=lambda place: shape[place])] = "fsdp"
    return P(*spec)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every leaf: parameters and their moments by their logical axes, the rest replicated."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            axes = tuple(leaf.get_metadata().get("axes", ()))
            return leaf.replace(NamedSharding(mesh, leaf_spec(mesh, leaf.get_value().shape, axes)))
        return NamedSharding(mesh, P())

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh, leading: int = 1) -> NamedSharding:
    """Rows by `AXIS_RULES`; `leading` unsplit axes (the accumulation window) come first."""
    return NamedSharding(mesh, P(*([None] * leading), AXIS_RULES["rows"]))


def layer_wrapper(mesh: Mesh, remat: Wrapper | None) -> Wrapper:
    """What goes around the body of a scan over layers: rows stay split between layers, then recomputation.

    Without it the compiler may gather every row's activations on every device rather than a layer's weights.
    """
    rows = batch_sharding(mesh, leading=0)

    def wrap(body: Body) -> Body:
        def split(carry: Any, layer: Any) -> tuple[Any, Any]:
            carry, out = body(jax.lax.with_sharding_constraint(carry, rows), layer)
            return jax.lax.with_sharding_constraint(carry, rows), out

        return remat(split) if remat else split

    return wrap


def rows_over_hosts(rows: int, mesh: Mesh) -> int:
    """This host's share of a global batch of rows; an uneven one is an error."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards or rows % jax.process_count():
        raise UserError(
            f"rows must divide by data x fsdp = {shards} and by {jax.process_count()} hosts",
            field="batch.rows",
            value=rows,
            mend=f"Use a multiple of {np.lcm(shards, jax.process_count())}",
        )
    return rows // jax.process_count()


def put_batch(batch: Any, mesh: Mesh, leading: int = 1) -> Any:
    """Host arrays (this host's rows) -> global device arrays."""
    sharding = batch_sharding(mesh, leading)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def compile_step(
    step: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh, state_sharding: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Jit a training step over the mesh; the state is donated."""
    return jax.jit(
        step,
        in_shardings=(state_sharding, batch_sharding(mesh)),
        out_shardings=(state_sharding, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
