"""InternVL2's other members beside transformers: Llama and Qwen2 decoders, and the large tower's norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from csp_jax.models.registry import load_model
from csp_jax.parity.golden import prompts_alone

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

IMAGE, SIDE, TILES = 90, 56, 3
TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
LARGE = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
SMALL = {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True}
MEMBERS = {
    "qwen2, small tower": ("qwen2", SMALL, False),
    "llama, large tower": ("llama", LARGE, False),
    "qwen2, tied": ("qwen2", SMALL, True),
}


def torch_model(decoder: str, tower: dict[str, Any], tied: bool) -> InternVLForConditionalGeneration:
    torch.manual_seed(6)
    text = {**TEXT, "model_type": decoder, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    vision = {**VISION, **tower, "image_size": [SIDE, SIDE], "patch_size": [14, 14], "use_mean_pooling": True}
    config = InternVLConfig(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hub_tensors(model: InternVLForConditionalGeneration, tied: bool) -> dict[str, torch.Tensor]:
    """The weights under the names of the original's files."""
    theirs = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tower, text = "model.vision_tower.", "model.language_model."
    hub = {f"language_model.model.{k.removeprefix(text)}": v for k, v in theirs.items() if k.startswith(text)}
    if not tied:
        hub["language_model.lm_head.weight"] = theirs["lm_head.weight"]
    for ours, their in (
        ("class_embedding", "cls_token"),
        ("position_embedding", "position_embeddings"),
        ("patch_embedding.weight", "patch_embeddings.projection.weight"),
        ("patch_embedding.bias", "patch_embeddings.projection.bias"),
    ):
        hub[f"vision_model.embeddings.{ours}"] = theirs[f"{tower}embeddings.{their}"]
    for number, their in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
        for kind in ("weight", "bias"):
            hub[f"mlp1.{number}.{kind}"] = theirs[f"model.multi_modal_projector.{their}.{kind}"]
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for layer in range(VISION["num_hidden_layers"]):
        before, after = f"{tower}encoder.layer.{layer}.", f"vision_model.encoder.layers.{layer}."
        hub[f"{after}ls1"], hub[f"{after}ls2"] = theirs[f"{before}lambda_1"], theirs[f"{before}lambda_2"]
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{before}attention.{part}_proj.{kind}") for part in "qkv"]
            if parts[0] is not None:
                hub[f"{after}attn.qkv.{kind}"] = torch.cat(parts)
            for their, ours in names.items():
                if f"{before}{their}.{kind}" in theirs:
                    hub[f"{after}{ours}.{kind}"] = theirs[f"{before}{their}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in hub.items()}


def write(folder: Path, model: InternVLForConditionalGeneration, decoder: str, tower: dict, tied: bool) -> None:
    vision = {
        **VISION,
        "image_size": SIDE,
        "patch_size": 14,
        "norm_type": tower["norm_type"],
        "qk_normalization": tower["use_qk_norm"],
        "qkv_bias": tower["attention_bias"],
    }
    text = {**TEXT, "model_type": decoder, "rope_theta": 5e5, "rope_scaling": None, "tie_word_embeddings": tied}
    values = {"model_type": "internvl_chat", "llm_config": text, "vision_config": vision, "force_image_size": SIDE}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(hub_tensors(model, tied), folder / "model.safetensors")


@pytest.mark.parametrize("member", MEMBERS)
def test_members_are_as_transformers_has_them(member, tmp_path):
    decoder, tower, tied = MEMBERS[member]
    theirs = torch_model(decoder, tower, tied)
    write(tmp_path, theirs, decoder, tower, tied)
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((TILES, SIDE, SIDE, 3)).astype(np.float32)
    ids = np.array([[1, 2, *[IMAGE] * (4 * TILES), 7, 8, 9, 10]])
    with torch.no_grad():
        values = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        wanted = theirs(input_ids=torch.from_numpy(ids), pixel_values=values).logits[0].numpy()

    model = load_model(tmp_path)
    slots = np.where(ids == IMAGE, model.image_token, ids).astype(np.int32)
    batch = prompts_alone(slots, np.ones_like(slots))
    batch.grid = np.array([[[1, 2]]], np.int32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, pixels: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.hidden_states(batch, model.embed_prompt(batch, pixels)) @ model.decoder.head_kernel()

    found = np.asarray(run(state, pixels[None]))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * wanted.std() * 5, rtol=0)
    assert wanted.std() > 0.3
