"""Phi-3.5-vision: CLIP over crops and a view of the whole, learned separators between rows, a Phi-3 decoder.

The crops' features lie in the prompt as one picture: row by row over all crops, a separator at each row's end, one
between crops and the view of the whole, which follows in the same way. The decoder turns its rotary frequencies by
one list of factors for short sequences and by another for long ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.families.interface import IMAGE_SLOT
from csp_jax.models.attention import rope_frequencies
from csp_jax.models.blocks import Mlp
from csp_jax.models.cells import Cells, lay_cells, sampled_weights, shrink
from csp_jax.models.checkpoint_map import SAME, Tensor, fused, layer_tensors, leading, linear, split_rows
from csp_jax.models.decoder import Decoder, DecoderConfig, Tables
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.vision import ClipConfig, ClipVision, clip_tensors, each_cell, merge_squares

CLIP_LARGE = {  # the tower that the configuration names without giving its sizes
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Divisors of the rotary frequencies for sequences up to `trained_length` and beyond, and a scale of both."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained_length: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Phi3VisionConfig:
    """A Phi-3.5-vision checkpoint's sizes."""

    vision: ClipConfig
    text: DecoderConfig
    rope: LongRope

    @classmethod
    def from_hub(cls, config: HubConfig) -> Phi3VisionConfig:
        """Read `config.json`; an unsupported variant is an error naming the field."""
        config.require("hidden_act", "silu", default="silu")
        config.require("embd_layer.hd_transform_order", "sub_glb", default="glb_sub")
        config.require("embd_layer.use_hd_transform", True, default=False)
        config.require("embd_layer.with_learnable_separator", True, default=False)
        config.require("embd_layer.projection_cls", "mlp", default="linear")
        config.require("img_processor.name", "clip_vision_model", default="clip_vision_model")
        config.require("img_processor.num_img_tokens", 144, default=144)
        config.require("tie_word_embeddings", False, default=False)
        width, heads = config.get("hidden_size", 3072), config.get("num_attention_heads", 32)
        kv_heads = config.get("num_key_value_heads", None) or heads
        longest = config.get("max_position_embeddings", 4096)
        window = config.get("sliding_window", None)
        if window is not None and window < longest:
            config.refuse("sliding_window", window, f"It must reach over {longest} positions")
        text = DecoderConfig(
            vocab_size=config.get("vocab_size", 32064),
            hidden_size=width,
            intermediate_size=config.get("intermediate_size", 8192),
            num_layers=config.get("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=config.get("rope_theta", 10000.0),
        )
        return cls(_clip(config), text, _long_rope(config, text.head_dim, longest))


def _clip(config: HubConfig) -> ClipConfig:
    sizes = {**CLIP_LARGE, **config.get("_tiny_clip_config", {})}
    layers = sizes["num_hidden_layers"]
    return ClipConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=layers,
        num_heads=sizes["num_attention_heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        activation=sizes["hidden_act"],
        layer_norm_eps=sizes["layer_norm_eps"],
        feature_layer=config.require("img_processor.layer_idx", *range(-layers, 0), default=-2),
    )


def _long_rope(config: HubConfig, head_dim: int, longest: int) -> LongRope:
    config.require("rope_scaling.type", "su", "longrope", default=None)
    trained = config.get("original_max_position_embeddings", 4096)
    factors = [tuple(config.get(f"rope_scaling.{name}_factor", ())) for name in ("short", "long")]
    for name, values in zip(("short", "long"), factors):
        if len(values) != head_dim // 2:
            config.refuse(f"rope_scaling.{name}_factor", len(values), f"It must have {head_dim // 2} values")
    ratio = longest / trained
    scale = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
    return LongRope(factors[0], factors[1], trained, scale)


class Phi3Vision(VisionLanguageModel):
    """The model."""

    config_class = Phi3VisionConfig
    unused = ("vision.unused_layers", "vision.unused_norm")
    length_dependent = True

    def __init__(self, config: Phi3VisionConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.image_token = IMAGE_SLOT
        merged, width = 4 * config.vision.hidden_size, config.text.hidden_size
        self.vision = ClipVision(config.vision, dtype, rngs)
        self.row_end = nnx.Param(jnp.zeros((merged,), dtype), axes=("norm",))
        self.crops_end = nnx.Param(jnp.zeros((merged,), dtype), axes=("norm",))
        self.projector = Mlp(merged, width, width, activation="gelu", dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.text, dtype, rngs)

    @staticmethod
    def cells(grid: Int[Array, "batch pictures 2"], count: int) -> Cells:
        """Crops, and after each picture's the view of the whole."""
        return lay_cells(grid, grid[..., 0] > 0, count)

    def pixels(
        self, batch: Batch, canvas: Float[Array, "batch cells side side 3"]
    ) -> Float[Array, "batch cells side side 3"]:
        cells = self.cells(batch.grid, canvas.shape[1])
        whole = shrink(canvas, cells, sampled_weights)
        return self.normalize(jnp.where(cells.overview[..., None, None, None], whole, canvas))

    def encode_images(
        self,
        pixels: Float[Array, "batch cells height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        """The separator of rows, the one behind the crops, then the features of all cells."""
        features = each_cell(lambda cells: merge_squares(self.vision(cells, remat, self.attention)), pixels)
        ends = jnp.stack([self.row_end[...], self.crops_end[...]]).astype(features.dtype)
        ends = jnp.broadcast_to(ends, (features.shape[0], *ends.shape))
        return self.projector(jnp.concatenate([ends, features], axis=1))

    def feature_index(
        self, slot: Int[Array, "batch prompt"], grid: Int[Array, "batch pictures 2"] | None
    ) -> Int[Array, "batch prompt"]:
        assert grid is not None, "pictures in crops come with their grids"
        side = self.config.vision.image_size // self.config.vision.patch_size // 2
        rows, columns = grid[..., 0], grid[..., 1]
        crops = rows * side * (columns * side + 1)
        ends = jnp.cumsum(jnp.where(rows > 0, crops + 1 + side * (side + 1), 0), axis=1)
        last = jnp.cumsum(rows * columns + (rows > 0), axis=1) - 1  # each picture's view of the whole
        picture = jnp.sum(slot[..., None] >= ends[:, None, :], axis=-1)
        picture = jnp.minimum(picture, grid.shape[1] - 1)

        def own(values: Int[Array, "batch pictures"]) -> Int[Array, "batch prompt"]:
            return jnp.take_along_axis(values, picture, axis=1)

        local = slot - own(jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1))
        across, behind = own(columns), local - own(crops)
        in_crops = behind < 0
        width = jnp.where(in_crops, across * side, side)  # features in a row
        y, x = jnp.divmod(jnp.where(in_crops, local, behind - 1), width + 1)
        crop = own(last) - own(rows * columns) + (y // side) * across + x // side
        feature = jnp.where(in_crops, crop, own(last)) * side**2 + (y % side) * side + x % side
        return jnp.where(behind == 0, 1, jnp.where(x == width, 0, 2 + feature))

    def regime(self, lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        return (lengths > self.config.rope.trained_length).astype(jnp.float32)

    def rope(
        self,
        positions: Int[Array, "batch tokens"],
        lengths: Int[Array, "batch tokens"] | None = None,
        *,
        train: bool = False,
    ) -> Tables:
        rope, text = self.config.rope, self.config.text
        if lengths is None:
            lengths = positions + 1
        long = (self.regime(lengths) > 0)[..., None]
        factors = jnp.where(long, jnp.asarray(rope.long, jnp.float32), jnp.asarray(rope.short, jnp.float32))
        angle = positions[..., None].astype(jnp.float32) * rope_frequencies(text.head_dim, text.rope_theta) / factors
        return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale

    @staticmethod
    def duplicates(config: Phi3VisionConfig) -> dict[str, str]:
        return {"model.vision_embed_tokens.wte.weight": "model.embed_tokens.weight"}

    @staticmethod
    def tensors(config: Phi3VisionConfig) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""
        text, pictures, layer = config.text, "model.vision_embed_tokens", "model.layers.{n}"
        decoder = _layer(text)
        return [
            *clip_tensors(config.vision, "vision", f"{pictures}.img_processor.vision_model"),
            Tensor("row_end", (f"{pictures}.sub_GN",), leading(3)),
            Tensor("crops_end", (f"{pictures}.glb_GN",), leading(2)),
            *linear("projector.up", f"{pictures}.img_projection.0"),
            *linear("projector.down", f"{pictures}.img_projection.2"),
            Tensor("decoder.embed.embedding", ("model.embed_tokens.weight",), SAME),
            *layer_tensors("decoder.layers", layer, decoder, range(text.num_layers - 1)),
            *layer_tensors("decoder.last", layer, decoder, text.num_layers - 1),
            Tensor("decoder.norm.scale", ("model.norm.weight",), SAME),
            *linear("decoder.head", "lm_head", bias=False),
        ]


def _layer(text: DecoderConfig) -> list[Tensor]:
    keys = text.num_kv_heads * text.head_dim
    attention = ("attention.query", "attention.key", "attention.value")
    return [
        Tensor("attention_norm.scale", ("input_layernorm.weight",), SAME),
        *fused(attention, "self_attn.qkv_proj", split_rows(1, text.num_heads * text.head_dim, keys, keys)),
        *linear("attention.out", "self_attn.o_proj", bias=False),
        Tensor("mlp_norm.scale", ("post_attention_layernorm.weight",), SAME),
        *fused(
            ("mlp.gate", "mlp.up"), "mlp.gate_up_proj", split_rows(1, text.intermediate_size, text.intermediate_size)
        ),
        *linear("mlp.down", "mlp.down_proj", bias=False),
    ]
