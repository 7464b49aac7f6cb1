"""A run's folder: its configuration, versions, devices and layout, and what may change of it when the run goes on."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.sharding import device_bytes
from csp_jax.train.state import TrainState

# What a run may go on with: none of it changes what is computed but for rounding.
MAY_CHANGE = ("run.", "parallel.", "model.dtype", "model.param_dtype", "model.remat", "model.attention", "rollout.rows")
PACKAGES = ("csp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def prepare_folder(config: TrainConfig) -> None:
    """Write the configuration into the run folder, or refuse a folder of another run."""
    out = Path(config.run.out)
    file = out / "config.yaml"
    values = config.model_dump(mode="json")
    if file.exists():
        before, now = flatten(load_config(TrainConfig, file).model_dump(mode="json")), flatten(values)
        for field in {**before, **now}:
            if not field.startswith(MAY_CHANGE) and before.get(field) != now.get(field):
                raise UserError(
                    f"the folder holds a run with another configuration, here it is {now.get(field)!r}",
                    file=file,
                    field=field,
                    value=before.get(field),
                    mend="Choose another run.out or delete the folder",
                )
    out.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False))
    temporary.rename(file)


def note_plan(out: Path, config: TrainConfig, mesh: Mesh, state: TrainState, shardings: TrainState) -> None:
    """plan.json: how the run is laid out over its devices and what each holds between two updates, named as `csp plan`
    names it."""
    plan = {
        "devices": mesh.size,
        "strategy": config.parallel.strategy,
        "mesh": dict(mesh.shape),
        "batch": {"rows": config.batch.rows, "accumulation": config.batch.accumulation},
        "remat": config.model.remat,
        "attention": config.model.attention,
        "parameters": _size((state.trainable, state.frozen)),
        "parameters_trained": _size(state.trainable),
        "bytes_parameters": device_bytes((state.trainable, state.frozen), (shardings.trainable, shardings.frozen)),
        "bytes_optimizer": device_bytes(state.optimizer, shardings.optimizer),
    }
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def note_versions(out: Path) -> None:
    """versions.json: packages, devices and processes that the run goes on with."""
    devices = jax.devices()
    versions = {
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
    }
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
