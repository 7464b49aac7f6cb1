"""Checkpoints: what is torn is never picked up and is named; which ones are kept; another mesh, another precision."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from csp_jax.config import OptimizerConfig, ParallelConfig, RunConfig
from csp_jax.errors import UserError
from csp_jax.sharding import make_mesh
from csp_jax.train.checkpoint import Checkpoints, named_leaves
from csp_jax.train.configured import make_optimizer
from csp_jax.train.integrity import SEAL, flaw, seal, set_aside
from csp_jax.train.loop import check_skipped, place_state
from csp_jax.train.state import TrainState


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sealed checkpoints of two files each."""
    for step in (2, 4, 10):
        place = tmp_path / "checkpoints" / str(step)
        (place / "state").mkdir(parents=True)
        (place / "state" / "array").write_bytes(bytes(range(200)) * step)
        (place / "data").write_text(f'{{"next_index": {step}}}')
        seal(place)
    return tmp_path / "checkpoints"


def cut(place: Path) -> None:
    file = place / "state" / "array"
    file.write_bytes(file.read_bytes()[:-1])


def flip(place: Path) -> None:
    file = place / "state" / "array"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])


TEARS: list[tuple[Callable[[Path], Any], str]] = [
    (cut, "state/array has 1999 of 2000 bytes"),
    (flip, "state/array is not what was written"),
    (lambda place: (place / "data").unlink(), "data is missing"),
    (lambda place: (place / SEAL).unlink(), f"it has no {SEAL}"),
    (lambda place: (place / SEAL).write_text("{"), f"its {SEAL} is cut"),
]


@pytest.mark.parametrize(("tear", "said"), TEARS, ids=["cut", "flipped", "missing", "unsealed", "seal cut"])
def test_a_torn_checkpoint_is_named_and_set_aside(folder, tear, said):
    assert flaw(folder / "10") is None
    tear(folder / "10")
    (folder / "12.orbax-checkpoint-tmp-7").mkdir()
    found = set_aside(folder)
    assert found[0] == "checkpoint 12 was never finished: deleted"
    assert found[1].startswith(f"checkpoint 10 is not picked up: {said}")
    assert len(found) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
    assert (folder.with_name("checkpoints-torn") / "10").is_dir()
    assert set_aside(folder) == []


def test_sound_checkpoints_stay(folder):
    assert set_aside(folder) == []
    assert len(list(folder.iterdir())) == 3


def batches() -> Any:
    return iter(grain.MapDataset.range(100).to_iter_dataset().batch(2))


def small_state(mesh: jax.sharding.Mesh, dtype: Any = jnp.float32) -> TrainState:
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_model(seed=4))
    _, state = place_state(model, make_optimizer(OptimizerConfig(), 10), (), mesh)
    filled = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.25, leaf.dtype), state.optimizer)
    return dataclasses.replace(state, step=state.step + 7, optimizer=filled)


def test_onto_another_mesh_and_precision(tmp_path, monkeypatch):
    """Written from eight devices as data 2 x fsdp 2 x tensor 2; read as one device, fsdp 8, and in bfloat16."""
    monkeypatch.setattr("csp_jax.sharding.SMALLEST_SHARDED", 1)
    config = RunConfig()
    state, iterator = small_state(make_mesh(ParallelConfig(fsdp=2, tensor=2))), batches()
    for _ in range(3):
        next(iterator)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, print)
    checkpoints.save(7, state, iterator, 1.0)
    following = next(iterator)
    checkpoints.close()
    for parallel, devices, dtype in (
        (ParallelConfig(), jax.devices()[:1], jnp.float32),
        (ParallelConfig(data=1, fsdp=8), jax.devices(), jnp.float32),
        (ParallelConfig(tensor=2), jax.devices(), jnp.bfloat16),
    ):
        other, resumed = small_state(make_mesh(parallel, devices), dtype), batches()
        other = jax.tree.map(jnp.zeros_like, other)
        checkpoints = Checkpoints(tmp_path / "checkpoints", config, print)
        found, step = checkpoints.restore(other, resumed)
        checkpoints.close()
        assert step == 7
        np.testing.assert_array_equal(next(resumed), following)
        for (name, leaf), empty in zip(named_leaves(found).items(), jax.tree.leaves(other), strict=True):
            assert (leaf.dtype, leaf.sharding) == (empty.dtype, empty.sharding), name
            np.testing.assert_array_equal(leaf, named_leaves(state)[name].astype(leaf.dtype), err_msg=name)


def one_leaf(value: float) -> TrainState:
    """A state of one parameter."""
    count = jnp.zeros((), jnp.int32)
    return TrainState(count, nnx.State({"w": nnx.Param(jnp.full(3, value))}), nnx.State({}), (), count)


def test_which_checkpoints_are_kept(tmp_path):
    """The newest two, every fourth, the best one by loss."""
    config = RunConfig(keep=2, keep_every=4, keep_best=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, print)
    state, iterator = one_leaf(0.0), batches()
    losses = {1: 3.0, 2: 0.5, 3: 2.0, 4: 2.5, 5: 0.9, 6: 1.5, 7: 1.0}
    for step, loss in losses.items():
        checkpoints.save(step, state, iterator, loss)
    checkpoints.close()
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept - {0} == {2, 4, 6, 7}


def test_a_half_copied_checkpoint_is_passed_over(tmp_path):
    """A real one of which a file did not arrive: the one before is restored, and the loss is said."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", RunConfig(), said.append)
    for step in (3, 6):
        checkpoints.save(step, one_leaf(float(step)), batches(), 1.0)
    checkpoints.close()
    assert json.loads((tmp_path / "checkpoints" / "6" / SEAL).read_text())
    shutil.rmtree(tmp_path / "checkpoints" / "6" / "state" / "d")
    again = Checkpoints(tmp_path / "checkpoints", RunConfig(), said.append)
    found, step = again.restore(one_leaf(0.0), batches())
    again.close()
    assert step == 3
    np.testing.assert_array_equal(jax.tree.leaves(found.trainable)[0], np.full(3, 3.0))
    assert len(said) == 1
    assert "checkpoint 6 is not picked up: state/d/" in said[0]


def test_too_many_skipped_updates_end_the_run():
    check_skipped(20, 20, 100)
    check_skipped(21, 0, 100)
    with pytest.raises(UserError, match="21 of 100 updates") as caught:
        check_skipped(21, 20, 100)
    assert caught.value.field == "run.skip_limit"
