"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder.

The class token is dropped, features are the last hidden state but one (no final norm), and the projector is
linear, exact GELU, linear.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.models.attention import rope_tables
from csp_jax.models.blocks import ACTIVATIONS, Mlp
from csp_jax.models.checkpoint_map import SAME, Tensor, layer_tensors, linear
from csp_jax.models.decoder import LLAMA_LAYER, Decoder, DecoderConfig, Tables
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.vision import ClipConfig, ClipVision, clip_tensors, each_cell


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA checkpoint's sizes."""

    vision: ClipConfig
    text: DecoderConfig
    image_token: int
    projector_activation: str

    @classmethod
    def from_hub(cls, config: HubConfig) -> LlavaConfig:
        """Read `config.json` as the hub writes it; an unsupported variant is an error naming the field."""
        config.require("vision_feature_select_strategy", "default", default="default")
        config.require("vision_config.model_type", "clip_vision_model", default="clip_vision_model")
        config.require("text_config.model_type", "llama", default="llama")
        config.require("text_config.hidden_act", "silu", default="silu")
        config.require("multimodal_projector_bias", True, default=True)
        config.require("text_config.mlp_bias", False, default=False)
        config.require("text_config.attention_bias", False, default=False)
        layers = config.get("vision_config.num_hidden_layers", 12)
        vision = ClipConfig(
            hidden_size=config.get("vision_config.hidden_size", 768),
            intermediate_size=config.get("vision_config.intermediate_size", 3072),
            num_layers=layers,
            num_heads=config.get("vision_config.num_attention_heads", 12),
            image_size=config.get("vision_config.image_size", 224),
            patch_size=config.get("vision_config.patch_size", 32),
            activation=config.require("vision_config.hidden_act", *ACTIVATIONS, default="quick_gelu"),
            layer_norm_eps=config.get("vision_config.layer_norm_eps", 1e-5),
            feature_layer=config.require("vision_feature_layer", *range(-layers, layers + 1), default=-2),
        )
        return cls(
            vision=vision,
            text=_llama_config(config),
            image_token=config.get("image_token_index", config.get("image_token_id", 32000)),
            projector_activation=config.require("projector_hidden_act", *ACTIVATIONS, default="gelu"),
        )


def _llama_config(config: HubConfig) -> DecoderConfig:
    width = config.get("text_config.hidden_size", 4096)
    heads = config.get("text_config.num_attention_heads", 32)
    rope: dict[str, Any] = config.get("text_config.rope_parameters", None) or {}
    config.require("text_config.rope_parameters.rope_type", "default", default="default")
    config.require("text_config.rope_scaling", None, default=None)
    return DecoderConfig(
        vocab_size=config.get("text_config.vocab_size", 32000),
        hidden_size=width,
        intermediate_size=config.get("text_config.intermediate_size", 11008),
        num_layers=config.get("text_config.num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=config.get("text_config.num_key_value_heads", heads) or heads,
        head_dim=config.get("text_config.head_dim", None) or width // heads,
        rms_norm_eps=config.get("text_config.rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("text_config.rope_theta", 10000.0)),
        tie_word_embeddings=config.get("tie_word_embeddings", config.get("text_config.tie_word_embeddings", False)),
    )


class Llava(VisionLanguageModel):
    """The model; `config_class` and `tensors` make it a family of the registry."""

    config_class = LlavaConfig
    unused = ("vision.unused_layers", "vision.unused_norm")
    aliases = (  # transformers has written these checkpoints in three ways
        (re.compile(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)"), ""),
        (re.compile(r"^language_model\.(?!model\.|lm_head)"), "language_model.model."),
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
    )
    modules = (
        (re.compile(r"^language_model\.model\."), "model.language_model."),
        (re.compile(r"^vision_tower\.vision_model\."), "model.vision_tower."),
        (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
    )

    def __init__(self, config: LlavaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.image_token = config.image_token
        width = config.text.hidden_size
        self.vision = ClipVision(config.vision, dtype, rngs)
        self.projector = Mlp(
            config.vision.hidden_size,
            width,
            width,
            activation=config.projector_activation,
            dtype=dtype,
            rngs=rngs,
        )
        self.decoder = Decoder(config.text, dtype, rngs)

    def encode_images(
        self,
        pixels: Float[Array, "batch pictures height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        return each_cell(lambda cells: self.projector(self.vision(cells, remat, self.attention)), pixels)

    def rope(
        self, positions: Int[Array, "batch tokens"], lengths: Array | None = None, *, train: bool = False
    ) -> Tables:
        return rope_tables(positions, self.config.text.head_dim, self.config.text.rope_theta)

    @staticmethod
    def duplicates(config: LlavaConfig) -> dict[str, str]:
        tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
        return tied if config.text.tie_word_embeddings else {}

    @staticmethod
    def tensors(config: LlavaConfig) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""
        text, layer = config.text, "language_model.model.layers.{n}"
        return [
            *clip_tensors(config.vision, "vision", "vision_tower.vision_model"),
            *linear("projector.up", "multi_modal_projector.linear_1"),
            *linear("projector.down", "multi_modal_projector.linear_2"),
            Tensor("decoder.embed.embedding", ("language_model.model.embed_tokens.weight",), SAME),
            *layer_tensors("decoder.layers", layer, LLAMA_LAYER, range(text.num_layers - 1)),
            *layer_tensors("decoder.last", layer, LLAMA_LAYER, text.num_layers - 1),
            Tensor("decoder.norm.scale", ("language_model.model.norm.weight",), SAME),
            *([] if text.tie_word_embeddings else linear("decoder.head", "language_model.lm_head", bias=False)),
        ]
