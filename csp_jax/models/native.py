"""Checkpoints in our own layout: a hub folder's other files, and its leaves stacked and ready for any mesh.

Reading one needs no turning or stacking: every device reads its own part, in the precision that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding

from csp_jax.errors import UserError
from csp_jax.models.hub import flat_paths

WEIGHTS = "weights"


def is_native(directory: Path) -> bool:
    """Whether a folder holds leaves of ours."""
    return (directory / WEIGHTS).is_dir()


def save_native(directory: Path, state: nnx.State, repeated: tuple[str, ...]) -> None:
    """Write a state's leaves into a folder; `repeated`: hub keys that an export has to write besides."""
    leaves: dict[str, Any] = {path: variable.get_value() for path, variable in flat_paths(state).items()}
    leaves |= {f"repeated:{key}": np.zeros((), np.int8) for key in repeated}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / WEIGHTS).resolve(), leaves)


def load_native(
    directory: Path,
    abstract: nnx.State,
    sharding: Callable[[nnx.Variable], Sharding],
    dtype: np.dtype | None,
) -> tuple[nnx.State, tuple[str, ...]]:
    """A state and the repeated hub keys; each leaf in `dtype` (None: as stored) on the devices of its sharding."""
    folder = (directory / WEIGHTS).resolve()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = dict(checkpointer.metadata(folder).item_metadata.items())
            wanted = _wanted(folder, found, abstract, sharding, dtype)
            arrays = checkpointer.restore(folder, wanted)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot be read ({error})", file=folder, mend="Import the checkpoint again") from None
    leaves = flat_paths(abstract)
    filled = [(path, leaves[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(abstract)]
    state = nnx.from_flat_state([(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in filled])
    return state, tuple(key.removeprefix("repeated:") for key in found if key.startswith("repeated:"))


def _wanted(
    folder: Path,
    found: dict[str, Any],
    abstract: nnx.State,
    sharding: Callable[[nnx.Variable], Sharding],
    dtype: np.dtype | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    wanted = {}
    for path, variable in flat_paths(abstract).items():
        shape = variable.get_value().shape
        if path not in found or tuple(found[path].shape) != shape:
            raise UserError(
                f"config.json needs {shape}",
                file=folder,
                field=path,
                value=tuple(found[path].shape) if path in found else None,
                mend="Configuration and weights must be of one checkpoint; import it again",
            )
        kind = np.dtype(found[path].dtype if dtype is None else dtype)
        wanted[path] = jax.ShapeDtypeStruct(shape, kind, sharding=sharding(variable))
    for path, value in found.items():
        if path.startswith("repeated:"):
            wanted[path] = jax.ShapeDtypeStruct((), np.int8, sharding=next(iter(wanted.values())).sharding)
        elif path not in wanted:
            raise UserError("leaf is unknown", file=folder, field=path, value=tuple(value.shape))
    return wanted
