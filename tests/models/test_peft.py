"""PEFT's files: byte-equal round trips, fused modules, other backbones, strict reading, and PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_batches import family_batch, trained
from flax import nnx
from golden_folders import FAMILIES
from golden_llava import TINY
from safetensors.numpy import load_file, save_file
from tiny import difference, jitted_score, tiny_model, tiny_values
from tiny_families import family_config, family_model

from csp_jax.errors import UserError
from csp_jax.models.hub import HubFolder, canonical_key, hub_arrays, load_state
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import LoraParam, adapted, add_adapter, merge_adapter
from csp_jax.models.peft import hub_modules, is_adapter, load_adapter, read_config
from csp_jax.models.peft_writer import module_pattern, save_adapter
from csp_jax.models.registry import load_model, save_model

pytestmark = pytest.mark.usefixtures("exact")

PREFIX = "base_model.model."


def fill_b(model: VisionLanguageModel, seed: int = 0) -> VisionLanguageModel:
    generator = np.random.default_rng(seed)
    for _, layer in adapted(model):
        layer.lora_b[...] = jnp.asarray(generator.normal(0, 0.2, layer.lora_b.shape).astype(np.float32))
    return model


def adapter_state(model: VisionLanguageModel) -> nnx.State:
    return nnx.variables(model, LoraParam)


def log_probs(model: VisionLanguageModel, family: str) -> np.ndarray:
    batch = family_batch(family, model)
    pixels = model.pixels(batch, jnp.asarray(batch.canvas, jnp.float32) / 127.5 - 1)
    found = np.asarray(jitted_score(model, batch, pixels).log_probs)
    assert np.all(np.isfinite(found))
    return found


def test_what_peft_wrote_is_written_again_byte_for_byte(tmp_path):
    model = load_model(TINY)
    config = load_adapter(model, TINY / "lora")
    save_adapter(tmp_path, model, base="tiny_llava", config=config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (TINY / "lora" / file).read_bytes(), file


def test_older_names_of_modules_are_understood(tmp_path):
    """transformers once called the decoder's layers language_model.model.layers."""
    folder = copy_golden(tmp_path)
    new, old = f"{PREFIX}model.language_model.layers", f"{PREFIX}language_model.model.layers"
    arrays = {name.replace(new, old): a for name, a in load_file(folder / "adapter_model.safetensors").items()}
    assert all(name.startswith(old) for name in arrays)
    save_file(arrays, folder / "adapter_model.safetensors")
    found, wanted = load_model(TINY), load_model(TINY)
    load_adapter(wanted, TINY / "lora")
    edit_config(folder, target_modules=r"language_model\.model\.layers.*_proj")
    load_adapter(found, folder)
    assert difference(adapter_state(found), adapter_state(wanted)) == 0
    edit_config(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert "vision_tower" in refused(folder, "missing").field  # the tower has a q_proj, too


# --- fused modules: what PEFT computes from the file, on the original's own weights -----------------------------------


def merged_by_hand(model: VisionLanguageModel, folder: Path) -> VisionLanguageModel:
    """W + alpha / r * B A on the hub's tensors, by PEFT's definition; then imported as a plain checkpoint."""
    family, config = type(model), json.loads((folder / "adapter_config.json").read_text())
    weights = hub_arrays(nnx.state(model), family.tensors(model.config))
    arrays = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in arrays}
    for name in names:
        key = canonical_key(f"{name}.weight", family.aliases)
        rank = next((v for k, v in config["rank_pattern"].items() if name.endswith(k)), config["r"])
        alpha = next((v for k, v in config["alpha_pattern"].items() if name.endswith(k)), config["lora_alpha"])
        a, b = (arrays[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        assert a.shape[0] == b.shape[1] == rank
        weights[key] = weights[key] + np.float32(alpha / rank) * (b @ a)
    save_file(weights, folder / "model.safetensors")
    abstract = nnx.state(nnx.eval_shape(lambda: family(model.config, rngs=nnx.Rngs(0))))
    state = load_state(HubFolder(folder, family.aliases), abstract, family.tensors(model.config))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: family(model.config, rngs=nnx.Rngs(0)))), state)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_and_reads_its_adapter(family, tmp_path):
    """Trained, written, and read again: the same adapter; and in the original's modules it computes the same."""
    model, base = family_model(family), family_model(family)
    trained(family, ("decoder", "vision"), steps=2, model=model)
    save_adapter(tmp_path, model, base="somewhere")
    again = family_model(family)
    load_adapter(again, tmp_path, dropout=0.0)
    assert difference(adapter_state(again), adapter_state(model)) == 0
    assert [path for path, _ in adapted(again)] == [path for path, _ in adapted(model)]
    wanted = log_probs(model, family)
    np.testing.assert_allclose(log_probs(merged_by_hand(base, tmp_path), family), wanted, atol=1e-4)
    assert np.abs(log_probs(base, family) - wanted).max() > 1e-2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    fused = {"llava": 0, "qwen2_vl": 1, "internvl2": 2, "phi3_vision": 2, "qwen_vl": 2}[family]
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == fused
    assert set(config["rank_pattern"].values()) <= {6, 9}
    # and once more, over the file: byte for byte
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", again, base="somewhere", config={"lora_dropout": 0.05})
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("family", ["phi3_vision", "internvl2", "qwen_vl", "qwen2_vl"])
def test_a_fused_adapter_is_read_as_one_a_and_the_rows_of_b(family, tmp_path):
    """As PEFT trains one on the original's fused modules: exact, and written back byte for byte."""
    model, generator = family_model(family), np.random.default_rng(1)
    layers = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    fused = {name: parts for name, parts in hub_modules(model).items() if len(parts) > 1}
    arrays = {}
    for name, parts in fused.items():
        into = layers[parts[0].path].kernel.shape[-2]
        out = parts[0].rows.blocks * parts[0].rows.width
        arrays[f"{PREFIX}{name}.lora_A.weight"] = generator.normal(0, 0.3, (6, into)).astype(np.float32)
        arrays[f"{PREFIX}{name}.lora_B.weight"] = generator.normal(0, 0.3, (out, 6)).astype(np.float32)
    write(tmp_path, arrays, r=6, lora_alpha=12, target_modules=module_pattern(fused, hub_modules(model)))
    config = load_adapter(model, tmp_path)
    (first, *rest) = next(iter(fused.values()))
    parts = [dict(adapted(model))[part.path] for part in (first, *rest)]
    assert all(part.lora_a.shape[-1] == 6 for part in parts)
    assert difference(parts[0].lora_a[...], parts[1].lora_a[...]) == 0
    wanted = log_probs(merged_by_hand(family_model(family), tmp_path), family)
    np.testing.assert_allclose(log_probs(model, family), wanted, atol=1e-4)
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model, base="x", config=config)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def write(folder: Path, arrays: dict[str, np.ndarray], **config: Any) -> None:
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fresh = {
        "peft_type": "LORA",
        "bias": "none",
        "base_model_name_or_path": "x",
        "alpha_pattern": {},
        "rank_pattern": {},
    }
    fresh |= {"lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    fresh |= {"modules_to_save": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False}
    text = json.dumps({**fresh, **config}, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize("parts", [("query",), ("query", "value"), ("query", "key", "value")])
def test_some_parts_of_a_fused_module(parts, tmp_path):
    model = family_model("phi3_vision")
    add_adapter(model, [rf"decoder\.(layers|last)\.attention\.{part}$" for part in parts], rank=3, alpha=6)
    fill_b(model)
    save_adapter(tmp_path, model, base="x")
    assert read_config(tmp_path)["r"] == 3 * len(parts)
    again = family_model("phi3_vision")
    load_adapter(again, tmp_path)
    assert [path for path, _ in adapted(again)] == [path for path, _ in adapted(model)]
    assert difference(adapter_state(again), adapter_state(model)) == 0


def test_some_layers_of_a_stack(tmp_path):
    """PEFT may hold other layers, and other ranks in each: filled up with zeros that stay zero, and left out again."""
    folder = copy_golden(tmp_path)
    arrays = load_file(folder / "adapter_model.safetensors")
    kept = {key: value for key, value in arrays.items() if ".layers.0." in key and "q_proj" in key}
    key = next(key for key in kept if "lora_A" in key)
    model = tiny_model(num_hidden_layers=4)
    other = {
        f"{PREFIX}model.language_model.layers.{n}.self_attn.q_proj.lora_{letter}.weight": np.ones(shape, np.float32) * n
        for n, rank in ((0, 2), (2, 3))
        for letter, shape in (("A", (rank, 32)), ("B", (32, rank)))
    }
    other = {name: value + 1 for name, value in other.items()}
    assert key.replace("layers.0", "layers.2") in other
    pattern = r"model\.language_model\.layers\.(0|2)\.self_attn\.q_proj"
    ranks = {"model.language_model.layers.2.self_attn.q_proj": 3}
    write(
        folder,
        other,
        r=2,
        lora_alpha=4,
        target_modules=pattern,
        rank_pattern=ranks,
        alpha_pattern=dict.fromkeys(ranks, 6),
    )
    config = load_adapter(model, folder)
    ((path, layer),) = adapted(model)
    assert (path, layer.lora_a.shape) == ("decoder.layers.attention.query", (3, 32, 3))
    assert not np.any(layer.lora_a[...][1])
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model, base="x", config=config)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    del config["target_modules"]
    save_adapter(tmp_path / "again", model, base="x", config=config)
    assert read_config(tmp_path / "again")["target_modules"] == pattern


def test_scale_of_rank_stabilized_adapters(tmp_path):
    folder = copy_golden(tmp_path)
    edit_config(folder, use_rslora=True)
    model = load_model(TINY)
    config = load_adapter(model, folder)
    assert {layer.scale for _, layer in adapted(model)} == {8 / 4**0.5}
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model, base="tiny_llava", config=config)
    assert read_config(tmp_path / "again") == read_config(folder)


# --- other backbones, merged exports, whole folders -------------------------------------------------------------------


def model_folder(folder: Path, seed: int) -> Path:
    save_model(folder, family_model("llava", seed=seed))
    (folder / "config.json").write_text(json.dumps(family_config("llava").values))
    return folder


def test_an_adapter_on_another_backbone(tmp_path):
    """The same adapter on two bases adds the same; each base plus adapter is what merging by hand gives."""
    first, second = model_folder(tmp_path / "first", 0), model_folder(tmp_path / "second", 1)
    model = family_model("llava", seed=0)
    add_adapter(model, (r"decoder\.",), rank=3, alpha=6)
    fill_b(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, model, base=str(first))
    assert is_adapter(folder)
    assert not is_adapter(first)
    own = load_model(folder)  # finds its base
    assert difference(nnx.state(own), nnx.state(model)) == 0
    moved = load_model(second, adapter=folder)
    assert difference(adapter_state(moved), adapter_state(model)) == 0
    shutil.copytree(folder, tmp_path / "work")
    wanted = log_probs(merged_by_hand(family_model("llava", seed=1), tmp_path / "work"), "llava")
    np.testing.assert_allclose(log_probs(moved, "llava"), wanted, atol=1e-5)
    both = load_model(folder, adapter=folder)  # its own base with the adapter merged, and the adapter once more on top
    assert len(list(adapted(both))) == len(list(adapted(own)))
    assert np.abs(log_probs(both, "llava") - log_probs(own, "llava")).max() > 1e-3
    shutil.rmtree(first)
    with pytest.raises(UserError, match="base is not there") as caught:
        load_model(folder)
    assert caught.value.field == "base_model_name_or_path"


# --- strictness -------------------------------------------------------------------------------------------------------


def copy_golden(target: Path) -> Path:
    return Path(shutil.copytree(TINY / "lora", target / "lora"))


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}, indent=2, sort_keys=True))


def edit_arrays(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


def refused(folder: Path, problem: str) -> UserError:
    with pytest.raises(UserError, match=problem) as caught:
        load_adapter(load_model(TINY), folder)
    return caught.value


KEY = f"{PREFIX}model.language_model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "problem", "key"),
    [
        (lambda a: a.pop(KEY), "missing", KEY),
        (lambda a: [a.pop(k) for k in [KEY, KEY.replace("lora_B", "lora_A")]], "missing", KEY.replace("_B", "_A")),
        (lambda a: a.update({KEY: a[KEY][1:]}), "has shape", KEY),
        (lambda a: a.update({KEY: np.ascontiguousarray(a[KEY].T)}), "has shape", KEY),
        (lambda a: a.update({PREFIX + "lm_head.lora_A.weight": a[KEY]}), "unknown", PREFIX + "lm_head.lora_A.weight"),
        (
            lambda a: a.update({KEY.replace("layers.1", "layers.2"): a[KEY]}),
            "unknown",
            KEY.replace("layers.1", "layers.2"),
        ),
        (lambda a: a.update({"up.weight": a[KEY]}), "unknown", "up.weight"),
        (
            lambda a: a.update({KEY.replace("lora_B.weight", "lora_magnitude_vector"): a[KEY]}),
            "unknown",
            KEY.replace("lora_B.weight", "lora_magnitude_vector"),
        ),
        (
            lambda a: a.update(
                {
                    k.replace("language_model.layers.1.mlp.up_proj", "multi_modal_projector.linear_1"): v
                    for k, v in a.items()
                    if "1.mlp.up_proj" in k
                }
            ),
            "unknown",
            None,
        ),
        (
            lambda a: a.update({KEY.replace("model.language_model", "language_model.model"): a[KEY]}),
            "two names",
            None,
        ),
    ],
    ids=["one", "both", "rows", "turned", "head", "layer", "name", "dora", "not targeted", "twice"],
)
def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, change, problem, key):
    folder = copy_golden(tmp_path)
    edit_arrays(folder, change)
    error = refused(folder, problem)
    assert error.file == folder / "adapter_model.safetensors"
    assert error.field == key if key else "lora_" in str(error.field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["a.b"]),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_unsupported_variants_are_named(tmp_path, field, value):
    folder = copy_golden(tmp_path)
    edit_config(folder, **{field: value})
    error = refused(folder, "not supported")
    assert (error.file, error.field, error.value) == (folder / "adapter_config.json", field, value)


@pytest.mark.parametrize(("field", "value"), [("r", None), ("r", "8"), ("lora_alpha", 0), ("target_modules", [])])
def test_a_configuration_without_what_it_needs_is_refused(tmp_path, field, value):
    folder = copy_golden(tmp_path)
    edit_config(folder, **{field: value})
    assert refused(folder, "missing or of another kind").field == field


def test_other_damage_is_named(tmp_path):
    folder = copy_golden(tmp_path)
    edit_config(folder, r=5)
    assert refused(folder, "has shape").field.endswith("lora_A.weight")
    edit_config(folder, r=4, alpha_pattern={r"layers\.0\.mlp\.up_proj": 16, "q_proj": 3})
    load_adapter(load_model(TINY), folder)
    edit_config(folder, alpha_pattern={}, target_modules="nothing")
    assert refused(folder, "unknown").field.startswith(PREFIX)
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    assert refused(folder, "cannot be read").file == folder / "adapter_model.safetensors"
    (folder / "adapter_config.json").write_text("{")
    assert refused(folder, "not JSON").file == folder / "adapter_config.json"
    (folder / "adapter_config.json").unlink()
    assert refused(folder, "no adapter here").file == folder / "adapter_config.json"


def test_an_adapter_of_another_family_or_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown"):
        load_adapter(family_model("phi3_vision"), TINY / "lora")
    with pytest.raises(UserError, match="missing"):
        load_adapter(tiny_model(), TINY / "lora")
    with pytest.raises(UserError, match="has shape") as caught:
        load_adapter(tiny_model(num_hidden_layers=2), TINY / "lora")
    assert "lora_A" in str(caught.value.field)


def test_a_stack_of_unlike_scales_is_refused(tmp_path):
    model = tiny_model(num_hidden_layers=4)
    add_adapter(model, (r"decoder\.layers\.mlp\.up$",), rank=2, alpha=2)
    fill_b(model)
    save_adapter(tmp_path, model, base="x")
    edit_config(tmp_path, alpha_pattern={r"layers\.1\.mlp\.up_proj": 7})
    with pytest.raises(UserError, match=r"differs between the layers of decoder\.layers\.mlp\.up"):
        load_adapter(tiny_model(num_hidden_layers=4), tmp_path)


# --- PEFT itself ------------------------------------------------------------------------------------------------------


def torch_logits(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(5, 90, (1, 9)))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_peft_reads_what_we_write_and_we_read_what_it_writes(family, tmp_path):
    """In transformers, with text alone: the original with the adapter, the merged export, and back."""
    peft = pytest.importorskip("peft")
    import transformers

    kind = {"llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}[family]
    values = dict(tiny_values() if family == "llava" else family_config(family).values)
    model = tiny_model() if family == "llava" else family_model(family)
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(values))
    add_adapter(model, (r"decoder\.", r"vision\.layers\.attention"), rank=3, alpha=6)
    fill_b(model)
    adapter.mkdir()
    save_adapter(adapter, model, base=str(folder))
    plain = getattr(transformers, kind).from_pretrained(folder)
    before = torch_logits(plain)
    theirs = peft.PeftModel.from_pretrained(plain, adapter)
    found = peft.get_peft_model_state_dict(theirs)
    written = load_file(adapter / "adapter_model.safetensors")
    assert set(found) == set(written)
    for name, value in written.items():
        np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)
    logits = torch_logits(theirs)
    assert (logits - before).abs().max() > 0.1
    merged = tmp_path / "merged"
    save_model(merged, merge_adapter(model))
    (merged / "config.json").write_text(json.dumps(values))
    exported = getattr(transformers, kind).from_pretrained(merged)
    torch.testing.assert_close(torch_logits(exported), logits, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(folder, adapter=tmp_path / "theirs")
    assert difference(adapter_state(again), adapter_state(model)) == 0
    assert {layer.scale for _, layer in adapted(again)} == {2.0}
    config = load_adapter(load_model(folder), tmp_path / "theirs")
    save_adapter(tmp_path, again, base=str(folder), config=config)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
