"""Meshes and who holds what: one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

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
    """The mesh `data x fsdp x tensor`; one size may be -1 and takes what is left of the devices.

    Devices come host by host, so data goes over hosts first and tensor stays within one.
    """
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
    if config.strategy == "pmap" and sizes[1:] != [1, 1]:
        raise UserError(
            "pmap holds everything on every device",
            field="parallel.strategy",
            value=dict(zip(AXES, sizes)),
            mend="Set fsdp and tensor to 1, or use strategy: mesh",
        )
    hosts: dict[int, int] = {}
    for device in devices:
        hosts[device.process_index] = hosts.get(device.process_index, 0) + 1
    if any(count % sizes[2] for count in hosts.values()):
        raise UserError(
            "the tensor axis must stay within a host, for its devices are fed the same rows",
            field="parallel.tensor",
            value=sizes[2],
            mend=f"Use a divisor of {min(hosts.values())}",
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


def device_bytes(values: Any, shardings: Any) -> int:
    """What one device holds of arrays (or shapes) that are placed so."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


def row_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_over_hosts(rows: int, mesh: Mesh, field: str = "batch.rows") -> int:
    """This host's share of a global batch of rows; an uneven one is an error."""
    shards = row_shards(mesh)
    if rows % shards or rows % jax.process_count():
        raise UserError(
            f"rows must divide by data x fsdp = {shards} and by {jax.process_count()} hosts",
            field=field,
            value=rows,
            mend=f"Use a multiple of {np.lcm(shards, jax.process_count())}",
        )
    return rows // jax.process_count()


def put_batch(batch: Any, mesh: Mesh, leading: int = 1) -> Any:
    """Host arrays (this host's rows) -> global device arrays."""
    sharding = batch_sharding(mesh, leading)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def own_rows(tree: Any, rows: int) -> Any:
    """Global device arrays -> host arrays of this host's rows, so many: what `put_batch` is undone by."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    start = jax.process_index() * rows
    whole = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda array: array[start : start + rows], whole)


def gather_bytes(own: bytes) -> list[bytes]:
    """What every process gives, in their order, on each of them."""
    sizes = np.atleast_1d(multihost_utils.process_allgather(np.array(len(own))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    given = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(given, sizes, strict=True)]


def compile_step(step: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh, state_sharding: Any) -> jax.stages.Wrapped:
    """Jit a training step over the mesh; the state is donated. What the compiler cannot split asks `split_kernel`."""

    def on_mesh(state: Any, batch: Any) -> tuple[Any, Any]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(state_sharding, batch_sharding(mesh)),
        out_shardings=(state_sharding, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def split_kernel(kernel: Callable[..., tuple[Array, Array]], kv_heads: int) -> Callable[..., tuple[Array, Array]]:
    """An attention kernel (q, k, v, first, last -> out, lse) that runs on each device for its rows and heads.

    As it is where no mesh is set, or where each device runs a program of its own already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return kernel
    rows = AXIS_RULES["rows"]
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    tokens, numbers = P(rows, None, heads, None), P(rows, None)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, numbers, numbers),
        out_specs=(tokens, P(rows, None, heads)),
        check_vma=False,
    )


PMAP_AXIS = "devices"


def put_parts(batch: Any, mesh: Mesh, leading: int = 1) -> Any:
    """Host arrays (this host's rows) -> a part of the rows for each of this host's devices, under a leading axis."""
    local = _local_mesh(mesh)
    count = local.size

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        shape = (*array.shape[:leading], count, array.shape[leading] // count, *array.shape[leading + 1 :])
        parts = np.ascontiguousarray(np.moveaxis(array.reshape(shape), leading, 0))
        return jax.device_put(parts, NamedSharding(local, P(PMAP_AXIS)))

    return jax.tree.map(put, batch)


def compile_parts(step: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The replicated data-parallel trainer: `jax.pmap` of a step that sums over `PMAP_AXIS`; the state is donated.

    Between steps the state is one global, replicated array a leaf, as under `compile_step`, so that the same
    checkpoints serve both; pmap itself takes and gives each host's copies.
    """
    mapped = jax.pmap(step, PMAP_AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0)
    everywhere, here = NamedSharding(mesh, P()), NamedSharding(_local_mesh(mesh), P())

    def relabel(tree: Any, sharding: NamedSharding) -> Any:
        def relabel_leaf(leaf: jax.Array) -> jax.Array:
            copies = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

        return jax.tree.map(relabel_leaf, tree)

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = mapped(relabel(state, here), batch)
        return relabel(state, everywhere), relabel(metrics, everywhere)

    return run


def _local_mesh(mesh: Mesh) -> Mesh:
    """This host's devices of a mesh, in its order."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Mesh(np.array(own), (PMAP_AXIS,), axis_types=(AxisType.Auto,))
