"""InternVL2: InternViT over tiles and a thumbnail, 2 x 2 patches merged, an InternLM2, Llama or Qwen2 decoder.

The thumbnail of a noised picture is its clean pixels plus the reduced change of the tiles, so that it shows their
noise. InternLM2 stretches its rotary base for sequences beyond the length that it was trained on (dynamic NTK).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.families.interface import IMAGE_SLOT
from csp_jax.models.attention import rope_tables, whole_span
from csp_jax.models.blocks import ACTIVATIONS, LayerNorm, Linear, Mlp, scan_layers, stack_layers
from csp_jax.models.cells import Cells, lay_cells, shrink, smooth_weights
from csp_jax.models.checkpoint_map import (
    CONV,
    SAME,
    Tensor,
    fused,
    layer_tensors,
    leading,
    linear,
    norm,
    split_rows,
)
from csp_jax.models.decoder import LLAMA_LAYER, QKV_BIAS, Decoder, DecoderConfig, Tables
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.vision import VisionLayer, VisionLayerConfig, each_cell, merge_squares, patchify
from csp_jax.perturb import to_canvas

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DECODERS = ("internlm2", "llama", "qwen2")


@dataclasses.dataclass(frozen=True)
class InternVL2Config:
    """An InternVL2 checkpoint's sizes."""

    layer: VisionLayerConfig
    vision_layers: int
    image_size: int
    patch_size: int
    decoder: str  # one of DECODERS
    text: DecoderConfig
    ntk_factor: float  # 0: the rotary base does not depend on the length
    trained_length: int
    thumbnail: bool
    most_tiles: int

    @classmethod
    def from_hub(cls, config: HubConfig) -> InternVL2Config:
        """Read `config.json`; an unsupported variant is an error naming the field."""
        config.require("ps_version", "v2", default="v2")
        config.require("downsample_ratio", 0.5, default=0.5)
        config.require("select_layer", -1, default=-1)
        config.require("llm_config.hidden_act", "silu", default="silu")
        size = config.get("vision_config.image_size", 224)
        config.require("force_image_size", size, None, default=None)
        decoder = config.require("llm_config.model_type", *DECODERS, default=None)
        scaling = config.get("llm_config.rope_scaling", None) or {}
        if scaling:
            config.require("llm_config.rope_scaling.type", "dynamic", default=None)
            if decoder != "internlm2":
                config.refuse("llm_config.rope_scaling", scaling, f"With {decoder} it must be null")
        return cls(
            layer=_vision_layer(config),
            vision_layers=config.get("vision_config.num_hidden_layers", 48),
            image_size=size,
            patch_size=config.get("vision_config.patch_size", 14),
            decoder=decoder,
            text=_decoder(config, decoder),
            ntk_factor=float(scaling.get("factor", 0.0)),
            trained_length=config.get("llm_config.max_position_embeddings", 2048),
            thumbnail=config.get("use_thumbnail", True),
            most_tiles=config.get("max_dynamic_patch", 12) if config.get("dynamic_image_size", True) else 1,
        )


def _vision_layer(config: HubConfig) -> VisionLayerConfig:
    return VisionLayerConfig(
        hidden_size=config.get("vision_config.hidden_size", 3200),
        intermediate_size=config.get("vision_config.intermediate_size", 12800),
        num_heads=config.get("vision_config.num_attention_heads", 25),
        activation=config.require("vision_config.hidden_act", *ACTIVATIONS, default="gelu"),
        norm_eps=config.get("vision_config.layer_norm_eps", 1e-6),
        norm=config.require("vision_config.norm_type", "layer_norm", "rms_norm", default="rms_norm"),
        attention_bias=config.get("vision_config.qkv_bias", False),
        query_key_norm=config.get("vision_config.qk_normalization", True),
        layer_scale=True,
    )


def _decoder(config: HubConfig, decoder: str) -> DecoderConfig:
    """Sizes of the language model; the defaults are those of its own configuration class."""
    width = config.get("llm_config.hidden_size", 4096)
    heads = config.get("llm_config.num_attention_heads", 32)
    bias = config.require(
        "llm_config.bias" if decoder == "internlm2" else "llm_config.attention_bias", False, default=False
    )
    return DecoderConfig(
        vocab_size=config.get("llm_config.vocab_size", 92544),
        hidden_size=width,
        intermediate_size=config.get("llm_config.intermediate_size", 11008),
        num_layers=config.get("llm_config.num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=config.get("llm_config.num_key_value_heads", None) or heads,
        head_dim=config.get("llm_config.head_dim", None) or width // heads,
        rms_norm_eps=config.get("llm_config.rms_norm_eps", 1e-6),
        rope_theta=config.get("llm_config.rope_theta", 10000.0),
        attention_bias=decoder == "qwen2" or bias,
        tie_word_embeddings=config.get("llm_config.tie_word_embeddings", False),
    )


class InternVision(nnx.Module):
    """Patch embedding, class token, positions, layers with layer scale; no norm at the end."""

    def __init__(self, config: InternVL2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, patches = config.layer.hidden_size, (config.image_size // config.patch_size) ** 2
        self.patch_size = config.patch_size
        self.patch = Linear(3 * config.patch_size**2, width, bias=True, axes=("patch", "embed"), dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((width,), dtype), axes=("norm",))
        self.position = nnx.Param(jnp.zeros((patches + 1, width), dtype), axes=("position", "embed"))
        self.layers = stack_layers(lambda keys: VisionLayer(config.layer, dtype, keys), config.vision_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "images side side 3"], remat: Callable | None, attention: str
    ) -> Float[Array, "images patches width"]:
        """Patch features, class token dropped."""
        x = self.patch(patchify(pixels, self.patch_size))
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype)
        span = whole_span(x, attention)
        return scan_layers(self.layers, x, lambda layer, x: layer(x, span), remat)[:, 1:]


class InternVL2(VisionLanguageModel):
    """The model."""

    config_class = InternVL2Config
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    length_dependent = True

    def __init__(self, config: InternVL2Config, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.image_token = IMAGE_SLOT
        merged, width = 4 * config.layer.hidden_size, config.text.hidden_size
        self.vision = InternVision(config, dtype, rngs)
        self.merge_norm = LayerNorm(merged, epsilon=1e-5, dtype=dtype)
        self.projector = Mlp(merged, width, width, activation="gelu", dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.text, dtype, rngs)

    def cells(self, grid: Int[Array, "batch pictures 2"], count: int) -> Cells:
        """Tiles and thumbnails of a row; a picture of one tile has no thumbnail."""
        return lay_cells(grid, (grid[..., 0] * grid[..., 1] > 1) & self.config.thumbnail, count)

    def pixels(
        self, batch: Batch, canvas: Float[Array, "batch cells side side 3"]
    ) -> Float[Array, "batch cells side side 3"]:
        cells = self.cells(batch.grid, canvas.shape[1])
        weights = functools.partial(smooth_weights, limit=self.config.most_tiles)
        return self.normalize(canvas + shrink(canvas - to_canvas(batch.canvas), cells, weights))

    def encode_images(
        self,
        pixels: Float[Array, "batch cells height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        def encode(cells: Float[Array, "cells side side 3"]) -> Float[Array, "cells features width"]:
            return self.projector(self.merge_norm(merge_squares(self.vision(cells, remat, self.attention))))

        return each_cell(encode, pixels)

    def regime(self, lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        stretched = bool(self.config.ntk_factor) & (lengths > self.config.trained_length)
        return stretched.astype(jnp.float32)

    def rope(
        self,
        positions: Int[Array, "batch tokens"],
        lengths: Int[Array, "batch tokens"] | None = None,
        *,
        train: bool = False,
    ) -> Tables:
        config, text = self.config, self.config.text
        theta: float | Array = text.rope_theta
        if config.ntk_factor and lengths is not None:
            longer = jnp.maximum(lengths.astype(jnp.float32) / config.trained_length, 1.0)
            stretch = config.ntk_factor * longer - (config.ntk_factor - 1)
            theta = jnp.where(longer > 1, theta * stretch ** (text.head_dim / (text.head_dim - 2)), theta)
        return rope_tables(positions, text.head_dim, theta)

    @staticmethod
    def tensors(config: InternVL2Config) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""
        text, embeddings = config.text, "vision_model.embeddings"
        layer = "language_model.model.layers.{n}"
        names = INTERNLM2_NAMES if config.decoder == "internlm2" else LLAMA_NAMES
        decoder = {
            "internlm2": _internlm2_layer(text),
            "llama": LLAMA_LAYER,
            "qwen2": LLAMA_LAYER + QKV_BIAS,
        }[config.decoder]
        return [
            *linear("vision.patch", f"{embeddings}.patch_embedding")[1:],
            Tensor("vision.patch.kernel", (f"{embeddings}.patch_embedding.weight",), CONV),
            Tensor("vision.class_token", (f"{embeddings}.class_embedding",), leading(2)),
            Tensor("vision.position", (f"{embeddings}.position_embedding",), leading(1)),
            *layer_tensors(
                "vision.layers",
                "vision_model.encoder.layers.{n}",
                _vision_map(config.layer),
                range(config.vision_layers),
            ),
            *norm("merge_norm", "mlp1.0"),
            *linear("projector.up", "mlp1.1"),
            *linear("projector.down", "mlp1.3"),
            Tensor("decoder.embed.embedding", (f"language_model.model.{names[0]}.weight",), SAME),
            *layer_tensors("decoder.layers", layer, decoder, range(text.num_layers - 1)),
            *layer_tensors("decoder.last", layer, decoder, text.num_layers - 1),
            Tensor("decoder.norm.scale", ("language_model.model.norm.weight",), SAME),
            *([] if text.tie_word_embeddings else linear("decoder.head", f"language_model.{names[1]}", bias=False)),
        ]

    @staticmethod
    def duplicates(config: InternVL2Config) -> dict[str, str]:
        embed, head = INTERNLM2_NAMES if config.decoder == "internlm2" else LLAMA_NAMES
        tied = {f"language_model.{head}.weight": f"language_model.model.{embed}.weight"}
        return tied if config.text.tie_word_embeddings else {}


INTERNLM2_NAMES, LLAMA_NAMES = ("tok_embeddings", "output"), ("embed_tokens", "lm_head")
ATTENTION = ("attention.query", "attention.key", "attention.value")


def _vision_map(layer: VisionLayerConfig) -> list[Tensor]:
    width = layer.hidden_size
    parts = slice(None) if layer.norm == "layer_norm" else slice(1)  # a root-mean-square norm has no bias
    head_norms = [
        *norm("attention.query_norm", "attn.q_norm")[parts],
        *norm("attention.key_norm", "attn.k_norm")[parts],
    ]
    return [
        *norm("attention_norm", "norm1")[parts],
        *fused(ATTENTION, "attn.qkv", split_rows(1, width, width, width), bias=layer.attention_bias),
        *(head_norms if layer.query_key_norm else []),
        *linear("attention.out", "attn.proj"),
        Tensor("attention_scale", ("ls1",), SAME),
        *norm("mlp_norm", "norm2")[parts],
        *linear("mlp.up", "mlp.fc1"),
        *linear("mlp.down", "mlp.fc2"),
        Tensor("mlp_scale", ("ls2",), SAME),
    ]


def _internlm2_layer(text: DecoderConfig) -> list[Tensor]:
    """Queries, key and value of each key-value head lie together."""
    group = text.num_heads // text.num_kv_heads
    rows = split_rows(text.num_kv_heads, group * text.head_dim, text.head_dim, text.head_dim)
    return [
        Tensor("attention_norm.scale", ("attention_norm.weight",), SAME),
        *fused(ATTENTION, "attention.wqkv", rows),
        *linear("attention.out", "attention.wo", bias=False),
        Tensor("mlp_norm.scale", ("ffn_norm.weight",), SAME),
        *linear("mlp.gate", "feed_forward.w1", bias=False),
        *linear("mlp.up", "feed_forward.w3", bias=False),
        *linear("mlp.down", "feed_forward.w2", bias=False),
    ]
