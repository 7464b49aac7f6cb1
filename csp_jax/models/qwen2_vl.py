"""Qwen2-VL: a vision transformer over pictures of any shape, a merger of 2 x 2 patches, a Qwen2 decoder.

Patches of all pictures of a row go through the tower together and see their own picture alone. Rotary positions
in the tower are rows and columns; in the decoder every position has three axes (time, row, column): text counts on
all three, a picture's slots spread over rows and columns, and what follows a picture begins behind its largest side.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.models.attention import KERNELS, Span, rope_frequencies, segment_span, segment_starts
from csp_jax.models.blocks import LayerNorm, Linear, Mlp, scan_layers, stack_layers
from csp_jax.models.cells import Cells, lay_cells
from csp_jax.models.checkpoint_map import FRAMES, SAME, Tensor, fused, layer_tensors, linear, norm, split_rows
from csp_jax.models.decoder import LLAMA_LAYER, QKV_BIAS, Decoder, DecoderConfig, Tables
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.vision import VisionLayer, VisionLayerConfig, patchify

FRAMES_A_PATCH = 2  # a still picture is shown as two equal frames


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """A Qwen2-VL checkpoint's sizes."""

    layer: VisionLayerConfig
    vision_layers: int
    patch_size: int
    merge_size: int
    text: DecoderConfig
    sections: tuple[int, int, int]  # rotary frequencies of time, row and column
    image_token: int

    @classmethod
    def from_hub(cls, config: HubConfig) -> Qwen2VLConfig:
        """Read `config.json`, flat as the hub has it or nested as newer transformers write it."""
        inner = "text_config." if config.get("text_config", None) else ""
        config.require(f"{inner}hidden_act", "silu", default="silu")
        config.require(f"{inner}use_sliding_window", False, default=False)
        config.require("vision_config.temporal_patch_size", FRAMES_A_PATCH, default=FRAMES_A_PATCH)
        width = config.get("vision_config.embed_dim", 1280)
        text = qwen2_decoder(config, inner)
        config.require("vision_config.hidden_size", text.hidden_size, default=text.hidden_size)
        sections = config.get(f"{inner}rope_parameters.mrope_section", None)
        sections = sections or config.get(f"{inner}rope_scaling.mrope_section", (16, 24, 24))
        if sum(sections) != text.head_dim // 2:
            config.refuse(f"{inner}rope_scaling.mrope_section", sections, f"they must sum to {text.head_dim // 2}")
        return cls(
            layer=VisionLayerConfig(
                hidden_size=width,
                intermediate_size=int(width * config.get("vision_config.mlp_ratio", 4)),
                num_heads=config.get("vision_config.num_heads", 16),
                activation=config.require("vision_config.hidden_act", "quick_gelu", default="quick_gelu"),
                norm_eps=1e-6,
            ),
            vision_layers=config.get("vision_config.depth", 32),
            patch_size=config.get("vision_config.patch_size", 14),
            merge_size=config.require("vision_config.spatial_merge_size", 2, default=2),
            text=text,
            sections=tuple(sections),
            image_token=config.get("image_token_id", 151655),
        )


def qwen2_decoder(config: HubConfig, inner: str) -> DecoderConfig:
    """Sizes of a Qwen2 decoder from the fields whose names begin with `inner`."""
    width = config.get(f"{inner}hidden_size", 8192)
    heads = config.get(f"{inner}num_attention_heads", 64)
    theta = config.get(f"{inner}rope_parameters.rope_theta", None) or config.get(f"{inner}rope_theta", 1000000.0)
    tied = config.get("tie_word_embeddings", config.get(f"{inner}tie_word_embeddings", False))
    return DecoderConfig(
        vocab_size=config.get(f"{inner}vocab_size", 152064),
        hidden_size=width,
        intermediate_size=config.get(f"{inner}intermediate_size", 29568),
        num_layers=config.get(f"{inner}num_hidden_layers", 80),
        num_heads=heads,
        num_kv_heads=config.get(f"{inner}num_key_value_heads", 8) or heads,
        head_dim=config.get(f"{inner}head_dim", None) or width // heads,
        rms_norm_eps=config.get(f"{inner}rms_norm_eps", 1e-5),
        rope_theta=theta,
        attention_bias=True,
        tie_word_embeddings=tied,
    )


class Qwen2Vision(nnx.Module):
    """Patch embedding, layers with rotary rows and columns, and the merger into prompt slots."""

    def __init__(self, config: Qwen2VLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, group = config.layer.hidden_size, config.merge_size**2
        self.config = config
        values = FRAMES_A_PATCH * 3 * config.patch_size**2
        self.patch = Linear(values, width, axes=("patch", "embed"), dtype=dtype, rngs=rngs)
        self.layers = stack_layers(lambda keys: VisionLayer(config.layer, dtype, keys), config.vision_layers, rngs)
        self.merge_norm = LayerNorm(width, epsilon=config.layer.norm_eps, dtype=dtype)
        out = config.text.hidden_size
        self.merger = Mlp(group * width, group * width, out, activation="gelu", dtype=dtype, rngs=rngs)

    def __call__(
        self, pixels: Float[Array, "batch cells side side 3"], cells: Cells, remat: Callable | None, attention: str
    ) -> Float[Array, "batch cells out"]:
        """One feature a cell; a patch sees those of its picture."""
        batch, count, side = pixels.shape[:3]
        group = self.config.merge_size**2
        patches = patchify(pixels.reshape(-1, side, side, 3), self.config.patch_size)
        x = self.patch(jnp.tile(patches.reshape(batch, count * group, -1), FRAMES_A_PATCH))
        picture = jnp.repeat(cells.picture, group, axis=1)
        used = jnp.repeat(cells.used, group, axis=1)
        if attention in KERNELS:
            mask: Array | Span = segment_span(jnp.where(used, picture + 1, 0), attention)
        else:
            mask = (picture[:, :, None] == picture[:, None, :]) & used[:, None, :]
        tables = self._tables(cells)
        x = scan_layers(self.layers, x, lambda layer, x: layer(x, mask, tables), remat)
        return self.merger(self.merge_norm(x).reshape(batch, count, -1))

    def _tables(self, cells: Cells) -> Tables:
        """Half of the channel pairs turn with the patch's row, half with its column."""
        merge = self.config.merge_size
        inner_row, inner_column = np.divmod(np.arange(merge**2), merge)
        place = [
            (start[..., None] * merge + inner).reshape(start.shape[0], -1)
            for start, inner in ((cells.row, inner_row), (cells.column, inner_column))
        ]
        layer = self.config.layer
        frequency = rope_frequencies(layer.hidden_size // layer.num_heads // 2, 10000.0)
        angle = jnp.concatenate([axis[..., None].astype(jnp.float32) * frequency for axis in place], axis=-1)
        return jnp.cos(angle), jnp.sin(angle)


class Qwen2VL(VisionLanguageModel):
    """The model."""

    config_class = Qwen2VLConfig
    aliases = (
        (re.compile(r"^model\.language_model\."), "model."),
        (re.compile(r"^model\.visual\."), "visual."),
    )
    modules = (
        (re.compile(r"^model\."), "model.language_model."),
        (re.compile(r"^visual\."), "model.visual."),
    )

    def __init__(self, config: Qwen2VLConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.image_token = config.image_token
        self.vision = Qwen2Vision(config, dtype, rngs)
        self.decoder = Decoder(config.text, dtype, rngs)

    def encode_images(
        self,
        pixels: Float[Array, "batch cells height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        return self.vision(pixels, self._cells(grid, pixels.shape[1]), remat, self.attention)

    @staticmethod
    def _cells(grid: Int[Array, "batch pictures 2"] | None, count: int) -> Cells:
        assert grid is not None, "pictures of any shape come with their grids"
        return lay_cells(grid, jnp.zeros(grid.shape[:2], bool), count)

    def positions(self, batch: Batch) -> tuple[Int[Array, "batch prompt 3"], Int[Array, "batch prompt"]]:
        """A slot is placed at its row and column behind what came before its picture; text behind all of that."""
        slot = self.slots(batch)
        step = jnp.where(slot, 0, 1)
        offset = jnp.zeros((*slot.shape, 3), step.dtype)
        if batch.grid is not None and batch.grid.shape[1] > 0:
            cells = self._cells(batch.grid, slot.shape[1])
            number = jnp.maximum(jnp.cumsum(slot, axis=1) - 1, 0)

            def at_slot(values: Array) -> Array:
                return jnp.where(slot, jnp.take_along_axis(values, number, axis=1), 0)

            rows, columns = at_slot(cells.grid[..., 0]), at_slot(cells.grid[..., 1])
            row, column = at_slot(cells.row), at_slot(cells.column)
            ends = slot & (row == rows - 1) & (column == columns - 1)
            step = jnp.where(ends, jnp.maximum(rows, columns), step)
            offset = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
        passed = jnp.cumsum(step, axis=1)
        start = jnp.take_along_axis(passed - step, segment_starts(batch.prompt_segment), axis=1)
        return (passed - step - start)[..., None] + offset, passed - start

    def rope(
        self,
        positions: Int[Array, "batch tokens *axes"],
        lengths: Int[Array, "batch tokens"] | None = None,
        *,
        train: bool = False,
    ) -> Tables:
        """Text positions [batch, tokens] count on all three axes."""
        text = self.config.text
        if positions.ndim == 2:
            positions = jnp.repeat(positions[..., None], 3, axis=-1)
        axis = np.repeat(np.arange(3), self.config.sections)
        angle = positions[..., axis].astype(jnp.float32) * rope_frequencies(text.head_dim, text.rope_theta)
        return jnp.cos(angle), jnp.sin(angle)

    @staticmethod
    def duplicates(config: Qwen2VLConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}

    @staticmethod
    def tensors(config: Qwen2VLConfig) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""
        text, width, layer = config.text, config.layer.hidden_size, "model.layers.{n}"
        blocks = [
            *norm("attention_norm", "norm1"),
            *fused(
                ("attention.query", "attention.key", "attention.value"),
                "attn.qkv",
                split_rows(1, width, width, width),
                bias=True,
            ),
            *linear("attention.out", "attn.proj"),
            *norm("mlp_norm", "norm2"),
            *linear("mlp.up", "mlp.fc1"),
            *linear("mlp.down", "mlp.fc2"),
        ]
        return [
            Tensor("vision.patch.kernel", ("visual.patch_embed.proj.weight",), FRAMES),
            *layer_tensors("vision.layers", "visual.blocks.{n}", blocks, range(config.vision_layers)),
            *norm("vision.merge_norm", "visual.merger.ln_q"),
            *linear("vision.merger.up", "visual.merger.mlp.0"),
            *linear("vision.merger.down", "visual.merger.mlp.2"),
            Tensor("decoder.embed.embedding", ("model.embed_tokens.weight",), SAME),
            *layer_tensors("decoder.layers", layer, LLAMA_LAYER + QKV_BIAS, range(text.num_layers - 1)),
            *layer_tensors("decoder.last", layer, LLAMA_LAYER + QKV_BIAS, text.num_layers - 1),
            Tensor("decoder.norm.scale", ("model.norm.weight",), SAME),
            *([] if text.tie_word_embeddings else linear("decoder.head", "lm_head", bias=False)),
        ]
