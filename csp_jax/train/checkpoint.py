"""Checkpoints of a run: state and data iterator, written asynchronously, restored bit for bit."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Int
from orbax.checkpoint import checkpoint_managers as policy

from csp_jax.config import RunConfig
from csp_jax.errors import UserError, full_disk_named
from csp_jax.models.hub import companions
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import has_adapter, merge_adapter
from csp_jax.models.peft_writer import save_adapter
from csp_jax.models.registry import save_model
from csp_jax.train import hosts
from csp_jax.train.integrity import seal_unfinished, set_aside

BASE = "base"  # the name of the fingerprint among the leaves of a checkpoint


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Every array of a state under a readable name."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def kept_leaves(state: Any) -> dict[str, jax.Array]:
    """What a checkpoint holds: the whole state; in place of an adapter's base, which lies in its own folder and does
    not change, a fingerprint."""
    leaves = named_leaves(state)
    if not has_adapter(state.trainable):
        return leaves
    prefix = ".frozen"
    return {name: leaf for name, leaf in leaves.items() if not name.startswith(prefix)} | {
        BASE: fingerprint(jax.tree.leaves(state.frozen))
    }


@jax.jit
def fingerprint(leaves: list[jax.Array]) -> Int[jax.Array, ""]:
    """A number that a change of any bit changes, whatever the sharding."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in leaves:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        place = jax.lax.broadcasted_iota(jnp.uint32, (1, bits.size), 1).reshape(bits.shape)
        total = total * 31 + jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total


class Checkpoints:
    """The checkpoints of one run folder: the newest, every so many steps, the best by loss (see `RunConfig`).

    What is torn is set aside before anything is picked up, and named.
    """

    def __init__(self, directory: Path, config: RunConfig, say: Callable[[str], None]):
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        if hosts.is_first():
            for text in set_aside(self.directory):
                say(text)
        hosts.wait_for_all("checkpoints")
        policies: list[Any] = [policy.LatestN(n=config.keep)]
        if config.keep_every:
            policies.append(policy.EveryNSteps(interval_steps=config.keep_every))
        if config.keep_best:
            policies.append(
                policy.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=config.keep_best)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies),
            create=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _seal(self) -> None:
        if hosts.is_first():
            seal_unfinished(self.directory)

    def save(self, step: int, state: Any, iterator: Any, loss: float) -> None:
        """Start writing a checkpoint; the run goes on meanwhile. `loss`: the mean since the one before."""
        if self.manager.latest_step() == step:
            return
        saved = ocp.args.StandardSave(kept_leaves(state))
        # One position for all hosts: it counts batches, and batch s of every host belongs to step s.
        position = ocp.args.JsonSave(copy.deepcopy(iterator.get_state()))
        with full_disk_named(self.directory):
            self.manager.save(step, args=ocp.args.Composite(state=saved, data=position), metrics={"loss": loss})

    def restore(self, state: Any, iterator: Any) -> tuple[Any, int]:
        """The newest checkpoint as `state` is shaped, typed and sharded (or `state` itself), and its step.

        It may have been written from another mesh, by another number of hosts and in another precision.
        """
        step = self.manager.latest_step()
        if step is None:
            return state, 0
        kept = kept_leaves(state)
        wanted = {name: _abstract(leaf) for name, leaf in kept.items()}
        self._check(step, wanted)
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore()),
        )
        iterator.set_state(restored["data"])
        found = restored["state"]
        if BASE in kept and int(found[BASE]) != int(kept[BASE]):
            raise UserError(
                "the base is another one than that the run began with",
                file=self.directory / str(step),
                mend="Put the base's folder back as it was, or choose another run.out",
            )
        leaves = [found.get(name, leaf) for name, leaf in named_leaves(state).items()]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), step

    def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        found = self.manager.item_metadata(step)["state"]
        shapes = {name: tuple(value.shape) for name, value in found.items()} if found is not None else {}
        for name, value in wanted.items():
            if shapes.get(name) != value.shape:
                raise UserError(
                    f"the run's model has shape {value.shape} there",
                    file=self.directory / str(step),
                    field=name,
                    value=shapes.get(name, "missing"),
                    mend="The folder holds another model's checkpoints: choose another run.out",
                )

    def close(self) -> None:
        """Wait until everything is on disk."""
        with full_disk_named(self.directory):
            self.manager.wait_until_finished()
            self.manager.close()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def export_model(directory: Path, model: VisionLanguageModel, source: Path, dtype: jnp.dtype | None = None) -> None:
    """A folder in the hub's layout: weights, and configuration and tokenizer copied from the source folder.

    It appears whole or not at all. An adapter is merged into the weights.
    """
    with _whole_folder(directory, source) as temporary:
        save_model(temporary, merge_adapter(model), dtype)


def export_adapter(
    directory: Path, model: VisionLanguageModel, source: Path, base: str, config: Mapping[str, Any]
) -> None:
    """A folder with a model's adapter in PEFT's layout, and configuration and tokenizer of its base.

    It appears whole or not at all. `base` is how the base is found again, `config` what `load_adapter` read.
    """
    with _whole_folder(directory, source) as temporary:
        save_adapter(temporary, model, base=base, config=config)


@contextlib.contextmanager
def _whole_folder(directory: Path, source: Path) -> Iterator[Path]:
    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with full_disk_named(temporary):
        for file in companions(source):
            shutil.copy2(file, temporary / file.name)
        yield temporary
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
