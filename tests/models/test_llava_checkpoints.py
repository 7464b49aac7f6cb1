"""Checkpoints in the hub's layout: a live comparison with transformers, byte-equal round trips, strict reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import GOLDEN, IMAGE_TOKEN, SIDE, SLOTS, difference, jitted_score, pack, tiny_model, tiny_values
from transformers import LlavaConfig as TorchLlavaConfig
from transformers import LlavaForConditionalGeneration

from csp_jax.data.batch import Branch, Sample, Shape
from csp_jax.errors import UserError
from csp_jax.models.hub import HubConfig, canonical_key
from csp_jax.models.llava import Llava, LlavaConfig
from csp_jax.models.registry import abstract_model, load_model, save_model

LLAVA15 = GOLDEN / "llava15"


def weights_only(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, target / name)
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return weights_only(GOLDEN / "tiny_llava", tmp_path / "checkpoint")


def test_what_is_read_and_written_again_is_the_same_file(tmp_path):
    save_model(tmp_path, load_model(LLAVA15))
    before, after = load_file(LLAVA15 / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in after.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in before.items()
    }
    again = tmp_path / "again"
    shutil.copyfile(LLAVA15 / "config.json", tmp_path / "config.json")
    save_model(again, load_model(tmp_path))
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_bfloat16_survives(tmp_path):
    source = weights_only(LLAVA15, tmp_path / "source")
    arrays = {name: a.astype(ml_dtypes.bfloat16) for name, a in load_file(LLAVA15 / "model.safetensors").items()}
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    save_model(tmp_path / "out", load_model(source, dtype=jnp.bfloat16))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (a.dtype, a.tobytes()) for n, a in after.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in arrays.items()
    }


def test_shards_are_read_through_their_index(tmp_path):
    arrays = load_file(LLAVA15 / "model.safetensors")
    names = sorted(arrays)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: arrays[name] for name in held}, tmp_path / file)
    shutil.copyfile(LLAVA15 / "config.json", tmp_path / "config.json")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in halves.items() for name in held}}))
    assert difference(nnx.state(load_model(tmp_path)), nnx.state(load_model(LLAVA15))) == 0
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="shard is missing") as caught:
        load_model(tmp_path)
    assert (caught.value.file, caught.value.value) == (index, "model-2.safetensors")
    index.write_text('{"weight_map": ')
    with pytest.raises(UserError, match="not an index") as caught:
        load_model(tmp_path)
    assert caught.value.file == index


# --- against transformers, live ---------------------------------------------------------------------------------


def torch_model(seed: int, **text: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = TorchLlavaConfig(**{k: v for k, v in tiny_values(**text).items() if k != "architectures"})
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: let them matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def live_inputs(seed: int) -> tuple[list[list[int]], np.ndarray]:
    """Two sequences of unlike length, each about two pictures."""
    generator = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return [int(token) for token in generator.integers(4, 96, count)]

    slots = [IMAGE_TOKEN] * SLOTS
    rows = [[1, *words(a), *slots, *words(b), *slots, *words(c)] for a, b, c in ((2, 3, 6), (1, 0, 4))]
    return rows, generator.standard_normal((2, 2, SIDE, SIDE, 3)).astype(np.float32)


def torch_log_probs(model: LlavaForConditionalGeneration, row: list[int], pixels: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), pixel_values=values).logits[0].log_softmax(-1)
    return logits[torch.arange(len(row) - 1), torch.tensor(row[1:])].numpy()


def our_log_probs(folder: Path, rows: list[list[int]], pixels: np.ndarray) -> list[np.ndarray]:
    """Of what follows the last picture, as a branch."""
    samples = []
    for row in rows:
        start = len(row) - row[::-1].index(IMAGE_TOKEN)
        tail = tuple(row[start:])
        samples.append(Sample(tuple(row[:start]), (), ((Branch(tail, (1.0,) * len(tail)),),)))
    batch = pack(Shape(2, 24, 1, 6, 8, 2, 0, None), samples, share_rows=False)
    log_probs = np.asarray(jitted_score(load_model(folder), batch, pixels).log_probs)
    return [log_probs[number, : len(sample.groups[0][0].tokens)] for number, sample in enumerate(samples)]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
def test_transformers_and_we_read_each_other(tmp_path, text):
    values = {**tiny_values(**text), **({"tie_word_embeddings": True} if text else {})}
    theirs = torch_model(3, **text)
    if text:
        theirs.config.tie_word_embeddings = True
        theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "theirs")
    rows, pixels = live_inputs(0)
    wanted = [torch_log_probs(theirs, row, image) for row, image in zip(rows, pixels)]
    for found, want in zip(our_log_probs(tmp_path / "theirs", rows, pixels), wanted):
        np.testing.assert_allclose(found, want[-len(found) :], atol=1e-5, rtol=1e-5)

    ours = tmp_path / "ours"
    save_model(ours, load_model(tmp_path / "theirs"))
    (ours / "config.json").write_text(json.dumps(values))
    back, notes = LlavaForConditionalGeneration.from_pretrained(ours, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    for row, image, want in zip(rows, pixels, wanted):
        np.testing.assert_array_equal(torch_log_probs(back.eval(), row, image), want)


@pytest.mark.usefixtures("exact")
def test_what_we_made_speaks_alike_in_transformers(tmp_path):
    save_model(tmp_path, tiny_model(seed=5))
    (tmp_path / "config.json").write_text(json.dumps(tiny_values()))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    rows, pixels = live_inputs(1)
    for row, image, found in zip(rows, pixels, our_log_probs(tmp_path, rows, pixels)):
        want = torch_log_probs(theirs, row, image)[-len(found) :]
        np.testing.assert_allclose(found, want, atol=1e-5, rtol=1e-5)


def test_defaults_are_those_of_transformers():
    values = {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    ours = LlavaConfig.from_hub(HubConfig(values, Path("config.json")))
    theirs = TorchLlavaConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in values.items()})
    text, vision = theirs.text_config, theirs.vision_config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "head_dim"):
        assert getattr(ours.text, name) == getattr(text, name), name
    assert (ours.text.num_layers, ours.text.num_heads) == (text.num_hidden_layers, text.num_attention_heads)
    assert ours.text.num_kv_heads == text.num_key_value_heads
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    for name in ("hidden_size", "intermediate_size", "image_size", "patch_size", "layer_norm_eps"):
        assert getattr(ours.vision, name) == getattr(vision, name), name
    assert (ours.vision.num_layers, ours.vision.num_heads) == (vision.num_hidden_layers, vision.num_attention_heads)
    assert ours.vision.activation == vision.hidden_act
    assert (ours.image_token, ours.vision.feature_layer) == (theirs.image_token_id, theirs.vision_feature_layer)
    assert ours.projector_activation == theirs.projector_hidden_act


# --- strict reading ---------------------------------------------------------------------------------------------

HEAD = "language_model.lm_head.weight"


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda arrays: arrays.pop(HEAD))
    with pytest.raises(UserError, match="missing") as caught:
        load_model(folder)
    assert (caught.value.file, caught.value.field) == (folder, HEAD)


def test_an_unknown_tensor_is_named(folder):
    rewrite(folder, lambda arrays: arrays.update({"visual.proj": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="unknown") as caught:
        load_model(folder)
    assert (caught.value.file, caught.value.field) == (folder, "visual.proj")


@pytest.mark.parametrize("name", [HEAD, "vision_tower.encoder.layers.1.mlp.fc1.weight"])
def test_a_misshapen_tensor_is_named(folder, name):
    rewrite(folder, lambda arrays: arrays.update({name: np.zeros((5, 7), np.float32)}))
    with pytest.raises(UserError, match=r"\(5, 7\)") as caught:
        load_model(folder)
    assert (caught.value.file, caught.value.field) == (folder / "model.safetensors", canonical_key(name, Llava.aliases))


def test_a_tensor_under_two_names_is_refused(folder):
    rewrite(folder, lambda arrays: arrays.update({"lm_head.weight": arrays[HEAD] + 1}))
    with pytest.raises(UserError, match="twice") as caught:
        load_model(folder)
    assert caught.value.field == HEAD


def test_buffers_without_weight_are_passed_over(folder):
    ids = {"vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None]}
    rewrite(folder, lambda arrays: arrays.update(ids))
    assert difference(nnx.state(load_model(folder)), nnx.state(load_model(GOLDEN / "tiny_llava"))) == 0


@pytest.mark.parametrize("kept", [0, 5, 4000, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_model(folder)
    assert caught.value.file == file


def test_a_folder_without_weights_or_configuration_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors") as caught:
        load_model(folder)
    assert caught.value.file == folder
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON") as caught:
        load_model(folder)
    assert caught.value.file == folder / "config.json"
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(folder)


def edit(folder: Path, field: str, value: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    *parents, last = field.split(".")
    node = values
    for part in parents:
        node = node[part]
    node[last] = value
    (folder / "config.json").write_text(json.dumps(values))


def test_another_family_is_named(folder):
    edit(folder, "model_type", "qwen3_vl")
    with pytest.raises(UserError, match="no such model family") as caught:
        load_model(folder)
    where = (caught.value.file, caught.value.field, caught.value.value)
    assert where == (folder / "config.json", "model_type", "qwen3_vl")
    edit(folder, "model_type", "llava")
    edit(folder, "text_config.num_hidden_layers", 3)  # a larger member of the family
    with pytest.raises(UserError, match="missing") as caught:
        load_model(folder)
    assert caught.value.field.startswith("language_model.model.layers.2.")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_feature_select_strategy", "full"),
        ("vision_config.model_type", "siglip_vision_model"),
        ("text_config.model_type", "mistral"),
        ("text_config.hidden_act", "gelu"),
        ("text_config.attention_bias", True),
        ("text_config.mlp_bias", True),
        ("multimodal_projector_bias", False),
        ("text_config.rope_parameters.rope_type", "linear"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("projector_hidden_act", "tanh"),
        ("vision_config.hidden_act", "tanh"),
        ("vision_feature_layer", [-2, -5]),
    ],
)
def test_an_unsupported_variant_is_refused(folder, field, value):
    edit(folder, field, value)
    with pytest.raises(UserError, match="not supported") as caught:
        abstract_model(HubConfig.read(folder))
    assert (caught.value.file, caught.value.field) == (folder / "config.json", field)
    assert caught.value.value == value
