"""Checkpoints of every family: byte-equal round trips, `.bin` files that are read and not run, strictness, memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from golden_folders import FAMILIES
from safetensors.numpy import load_file, save_file
from tiny import GOLDEN, difference
from typer.testing import CliRunner

from csp_jax.cli import app
from csp_jax.config import ParallelConfig
from csp_jax.errors import UserError
from csp_jax.models.hub import HubConfig, hub_arrays, save_hub
from csp_jax.models.registry import abstract_model, import_model, load_model, save_model
from csp_jax.sharding import make_mesh
from csp_jax.train.checkpoint import export_model


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a golden checkpoint."""
    return copy(request.param, tmp_path)


def copy(family: str, target: Path) -> Path:
    source, folder = GOLDEN / FAMILIES[family], target / "checkpoint"
    folder.mkdir()
    for file in [source / "config.json", *source.glob("model*")]:
        shutil.copyfile(file, folder / file.name)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}


def assert_same_bytes(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in one.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in two.items()
    }


def in_precision(folder: Path, dtype: type) -> None:
    for file in folder.glob("model*.safetensors"):
        save_file(
            {name: array.astype(dtype) for name, array in load_file(file).items()}, file, metadata={"format": "pt"}
        )


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_read_and_written_again_is_the_same(folder, tmp_path, dtype):
    in_precision(folder, dtype)
    model = load_model(folder, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype(dtype)}
    save_model(tmp_path / "out", model)
    assert_same_bytes(tensors(tmp_path / "out"), tensors(folder))
    if len(list(folder.glob("model*.safetensors"))) == 1:
        assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    wider = load_model(folder, dtype=jnp.float32)
    save_model(tmp_path / "back", wider, jnp.dtype(dtype))
    assert_same_bytes(tensors(tmp_path / "back"), tensors(folder))


def test_import_and_export_commands_give_the_same_bytes(folder, tmp_path):
    """Through our own layout and back, over a mesh of other sizes, nothing is lost."""
    in_precision(folder, ml_dtypes.bfloat16)
    (folder / "preprocessor_config.json").write_text('{"num_crops": 4}')
    run = CliRunner().invoke
    assert run(app, ["import", str(folder), str(tmp_path / "ours")]).exit_code == 0
    assert run(app, ["export", str(tmp_path / "ours"), str(tmp_path / "back")]).exit_code == 0
    assert_same_bytes(tensors(tmp_path / "back"), tensors(folder))
    kept = {file.name for file in (tmp_path / "back").iterdir() if "safetensors" not in file.name}
    assert kept == {"config.json", "preprocessor_config.json"}
    mesh = make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2))
    spread = load_model(tmp_path / "ours", dtype=jnp.float32, mesh=mesh)
    assert difference(nnx.state(spread), nnx.state(load_model(folder))) == 0
    split = [leaf for leaf in jax.tree.leaves(nnx.state(spread)) if not leaf.sharding.is_fully_replicated]
    assert split
    assert all(leaf.sharding.mesh == mesh for leaf in split)


def test_a_hub_folder_is_read_onto_a_mesh(folder):
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    spread = load_model(folder, mesh=mesh)
    assert difference(nnx.state(spread), nnx.state(load_model(folder))) == 0
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(spread)))


def test_every_hub_tensor_and_every_leaf_is_used_once(folder):
    """The map names each key of the checkpoint, parts of fused tensors cover them, no leaf is filled twice."""
    model = load_model(folder)
    found = hub_arrays(nnx.state(model), type(model).tensors(model.config))
    assert_same_bytes(found, tensors(folder))
    paths = [tensor.path for tensor in type(model).tensors(model.config)]
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(nnx.state(model)))


def test_large_checkpoints_are_written_in_shards(tmp_path):
    folder = copy("qwen2_vl", tmp_path)
    model = load_model(folder)
    save_hub(tmp_path / "out", nnx.state(model), type(model).tensors(model.config), shard_bytes=200_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors(folder).values())
    for name in names:
        assert set(load_file(tmp_path / "out" / name)) == {k for k, v in index["weight_map"].items() if v == name}
    shutil.copyfile(folder / "config.json", tmp_path / "out/config.json")
    assert difference(nnx.state(load_model(tmp_path / "out")), nnx.state(model)) == 0


def test_a_copy_of_the_embedding_is_kept(tmp_path):
    """Phi's published files hold the embedding twice."""
    folder, key = copy("phi3_vision", tmp_path), "model.vision_embed_tokens.wte.weight"
    arrays = tensors(folder)
    save_file({**arrays, key: arrays["model.embed_tokens.weight"]}, folder / "model.safetensors")
    import_model(folder, tmp_path / "ours")
    export_model(tmp_path / "back", load_model(tmp_path / "ours", dtype=None), tmp_path / "ours")
    assert_same_bytes(tensors(tmp_path / "back"), tensors(folder))
    save_file({**arrays, key: arrays["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="differs from") as caught:
        load_model(folder)
    assert caught.value.field == key


# --- strictness ----------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    file = sorted(folder.glob("model*.safetensors"))[-1]
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)
    return file


def refused(folder: Path, problem: str) -> UserError:
    with pytest.raises(UserError, match=problem) as caught:
        load_model(folder)
    return caught.value


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    whole = sorted(folder.glob("model*.safetensors"))[-1].read_bytes()
    last = sorted(folder.glob("model*.safetensors"))[-1]
    name = sorted(load_file(last))[0]
    edit(folder, lambda arrays: arrays.pop(name))
    assert refused(folder, "missing").field == name
    last.write_bytes(whole)
    edit(folder, lambda arrays: arrays.update({"extra.weight": np.zeros(3, np.float32)}))
    assert refused(folder, "unknown").field == "extra.weight"
    for name, array in list(load_file(GOLDEN / FAMILIES[family_of(folder)] / last.name).items())[::9]:
        last.write_bytes(whole)
        wrong = np.zeros((*array.shape[:-1], array.shape[-1] + 1), np.float32)
        edit(folder, lambda arrays, name=name, wrong=wrong: arrays.update({name: wrong}))
        error = refused(folder, "has shape")
        assert (error.file, error.field) == (last, name)


def family_of(folder: Path) -> str:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    names = {"qwen": "qwen_vl", "internvl_chat": "internvl2", "phi3_v": "phi3_vision"}
    return names.get(kind, kind)


@pytest.mark.parametrize("kept", [3, 200, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = sorted(folder.glob("model*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(folder, "cannot be read").file == file


def test_a_missing_shard_is_named(tmp_path):
    folder = copy("qwen_vl", tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = refused(folder, "shard is missing")
    assert (error.file, error.value) == (folder / "model.safetensors.index.json", "model-00002-of-00002.safetensors")


UNSUPPORTED = [
    ("qwen2_vl", "use_sliding_window", True),
    ("qwen2_vl", "rope_scaling.mrope_section", [2, 3, 4]),
    ("qwen2_vl", "vision_config.spatial_merge_size", 4),
    ("qwen2_vl", "vision_config.hidden_size", 32),
    ("internvl2", "ps_version", "v1"),
    ("internvl2", "select_layer", -4),
    ("internvl2", "downsample_ratio", 0.25),
    ("internvl2", "llm_config.model_type", "phi3"),
    ("internvl2", "llm_config.rope_scaling.type", "linear"),
    ("internvl2", "llm_config.bias", True),
    ("internvl2", "force_image_size", 224),
    ("internvl2", "vision_config.norm_type", "batch_norm"),
    ("phi3_vision", "rope_scaling.type", "yarn"),
    ("phi3_vision", "rope_scaling.long_factor", [1.0]),
    ("phi3_vision", "embd_layer.hd_transform_order", "glb_sub"),
    ("phi3_vision", "sliding_window", 100),
    ("phi3_vision", "img_processor.num_img_tokens", 576),
    ("qwen_vl", "no_bias", False),
    ("qwen_vl", "rotary_pct", 0.5),
    ("qwen_vl", "visual.output_dim", 128),
    ("qwen_vl", "visual", None),
]


@pytest.mark.parametrize(("family", "field", "value"), UNSUPPORTED, ids=lambda x: str(x))
def test_an_unsupported_variant_is_refused(family, field, value, tmp_path):
    folder = copy(family, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    *parents, last = field.split(".")
    node = values
    for part in parents:
        node = node[part]
    node[last] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="not supported") as caught:
        abstract_model(HubConfig.read(folder))
    assert (caught.value.file, caught.value.field) == (folder / "config.json", field)


def test_mistakes_in_our_own_layout_are_named(tmp_path):
    folder = copy("llava", tmp_path)
    import_model(folder, tmp_path / "ours")
    with pytest.raises(UserError, match="already"):
        import_model(folder, tmp_path / "ours")
    values = json.loads((tmp_path / "ours/config.json").read_text())
    values["text_config"]["intermediate_size"] += 8
    (tmp_path / "ours/config.json").write_text(json.dumps(values))
    error = refused(tmp_path / "ours", "config.json needs")
    assert error.field.startswith("decoder.")
    shutil.copyfile(folder / "config.json", tmp_path / "ours/config.json")
    shutil.rmtree(tmp_path / "ours/weights")
    (tmp_path / "ours/weights").mkdir()
    assert refused(tmp_path / "ours", "cannot be read").file == tmp_path / "ours/weights"


# --- .bin files ----------------------------------------------------------------------------------------------------


def as_bin(folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """A golden checkpoint as PyTorch writes it: two files and an index."""
    arrays, files = tensors(folder), []
    names = sorted(arrays)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = folder / f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: torch.from_numpy(arrays[name]).to(dtype) for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_bin_files_are_read(tmp_path):
    folder = copy("qwen_vl", tmp_path)
    wanted, arrays = nnx.state(load_model(folder)), tensors(folder)
    as_bin(folder)
    assert difference(nnx.state(load_model(folder)), wanted) == 0
    out = tmp_path / "out"
    save_model(out, load_model(folder, dtype=None))
    assert_same_bytes(tensors(out), arrays)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    table = {name: torch.nn.Parameter(torch.from_numpy(array).bfloat16()) for name, array in arrays.items()}
    shared = torch.stack([table["lm_head.weight"].data] * 2)  # a tensor that begins in the middle of its storage
    table["lm_head.weight"] = shared[1]
    torch.save(table, folder / "pytorch_model.bin")
    found = load_model(folder, dtype=None)
    assert_same_bytes(
        hub_arrays(nnx.state(found), type(found).tensors(found.config)),
        {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()},
    )


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_code_in_bin_files_is_never_run(tmp_path):
    folder = copy("qwen_vl", tmp_path)
    file = as_bin(folder)[0]
    trap = tmp_path / "sprung"
    table = torch.load(file)
    torch.save({**table, "extra": Trap(trap)}, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)  # a table that PyTorch would not trust either
    assert refused(folder, "asks for posix.mkdir").file == file
    assert not trap.exists()
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read("pytorch_model-00001-of-00002/data.pkl")
    pickle.loads(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")  # the trap is one
    assert trap.exists()
    assert b"mkdir" in pickled


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3000]), "cannot be read"),
        (lambda file: file.write_bytes(b"PK\x03\x04"), "not a zip archive"),
        (
            lambda file: torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False),
            "not a zip archive",
        ),
        (lambda file: torch.save([torch.zeros(3)], file), "not a table"),
        (lambda file: torch.save({"a": 3}, file), "no tensor"),
        (lambda file: torch.save({"a": torch.zeros(4, 3).T}, file), "not stored in rows"),
        (lambda file: torch.save({"a": torch.zeros(3).to_sparse()}, file), "cannot be read"),
    ],
    ids=["cut", "no archive", "old format", "a list", "a number", "turned", "sparse"],
)
def test_other_bin_files_are_refused(tmp_path, make, problem):
    folder = copy("qwen_vl", tmp_path)
    file = as_bin(folder)[1]
    make(file)
    assert refused(folder, problem).file == file


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from flax import nnx
from csp_jax.models.hub import HubConfig
from csp_jax.models.registry import abstract_model, load_model

folder = Path(sys.argv[1])
jnp.zeros(8).block_until_ready()
abstract_model(HubConfig.read(folder))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = load_model(folder, dtype=jnp.dtype(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sizes = [leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))]
print(json.dumps({"extra": peak - before - sum(sizes), "largest": max(sizes), "whole": sum(sizes)}))
"""


def measured(folder: Path, dtype: str) -> dict[str, int]:
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.heavy
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_reading_holds_one_leaf_beside_the_model(tmp_path, stored, dtype):
    """Peak memory of loading gigabytes: the parameters and 1.2 times the largest stacked one."""
    values = json.loads((GOLDEN / FAMILIES["phi3_vision"] / "config.json").read_text())
    sizes = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 96}
    values |= {**sizes, "num_key_value_heads": 96, "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = abstract_model(HubConfig.read(tmp_path), jnp.dtype(stored))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), nnx.state(model))
    save_hub(tmp_path, zeros, type(model).tensors(model.config))
    found = measured(tmp_path, dtype)
    assert found["whole"] > 1.5e9
    assert found["extra"] < 1.2 * found["largest"]
