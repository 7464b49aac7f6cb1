"""Qwen-VL(-Chat): a CLIP-like tower with resized positions, a resampler with 256 queries, a Qwen decoder.

In evaluation, sequences beyond the length that the model was trained on stretch the rotary base (dynamic NTK), and
queries at positions beyond it are scaled by the logarithm of their position (logn). In training both are off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.models.attention import attend, rope_tables, whole_span
from csp_jax.models.blocks import LayerNorm, Linear, scan_layers, stack_layers
from csp_jax.models.checkpoint_map import CONV, SAME, TRANSPOSE, Tensor, fused, layer_tensors, linear, norm, split_rows
from csp_jax.models.decoder import Decoder, DecoderConfig, Tables
from csp_jax.models.hub import HubConfig
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.vision import VisionLayer, VisionLayerConfig, each_cell, patchify

POSITIONS = 16  # the tower's and the resampler's positions are learned on a square of this side
HEAD_SIZE = 128  # of the resampler
NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen-VL checkpoint's sizes."""

    layer: VisionLayerConfig
    vision_layers: int
    image_size: int
    patch_size: int
    text: DecoderConfig
    trained_length: int
    dynamic_ntk: bool
    logn_attention: bool
    image_token: int

    @classmethod
    def from_hub(cls, config: HubConfig) -> QwenVLConfig:
        """Read `config.json`; an unsupported variant is an error naming the field."""
        if config.get("visual", None) is None:
            config.refuse("visual", None, "A Qwen model without pictures")
        config.require("no_bias", True, default=True)
        config.require("rotary_pct", 1.0, default=1.0)
        config.require("tie_word_embeddings", False, default=False)
        config.require("visual.n_queries", POSITIONS**2, default=POSITIONS**2)
        heads, head_dim = config.get("num_attention_heads", 32), config.get("kv_channels", 128)
        text = DecoderConfig(
            vocab_size=config.get("vocab_size", 151936),
            hidden_size=config.get("hidden_size", 4096),
            intermediate_size=config.get("intermediate_size", 22016) // 2,
            num_layers=config.get("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
            rope_theta=config.get("rotary_emb_base", 10000),
            attention_bias=True,
        )
        config.require("visual.output_dim", text.hidden_size, default=text.hidden_size)
        width = config.get("visual.width", 1664)
        return cls(
            layer=VisionLayerConfig(
                hidden_size=width,
                intermediate_size=int(width * config.get("visual.mlp_ratio", 4.9231)),
                num_heads=config.get("visual.heads", 16),
                activation="gelu",
                norm_eps=NORM_EPS,
            ),
            vision_layers=config.get("visual.layers", 48),
            image_size=config.get("visual.image_size", 448),
            patch_size=config.get("visual.patch_size", 14),
            text=text,
            trained_length=config.get("seq_length", 2048),
            dynamic_ntk=config.get("use_dynamic_ntk", True),
            logn_attention=config.get("use_logn_attn", True),
            image_token=config.get("visual.image_start_id", 151857) + 2,  # <img>, </img>, <imgpad>
        )


def resize_matrix(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Bicubic interpolation along one axis (slope -0.75, corners not aligned, the border repeated)."""
    matrix = np.zeros((target, source), np.float32)
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    for row, place in enumerate(places):
        base = math.floor(place)
        for tap in range(base - 1, base + 3):
            x = abs(place - tap)
            near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
            matrix[row, min(max(tap, 0), source - 1)] += near if x < 1 else far
    return matrix


def resize_positions(table: Float[Array, "source width"], side: int) -> Float[Array, "target width"]:
    """A square table of positions at another side."""
    if side == POSITIONS:
        return table
    matrix = jnp.asarray(resize_matrix(POSITIONS, side))
    grid = table.astype(jnp.float32).reshape(POSITIONS, POSITIONS, -1)
    grid = jnp.einsum("yi,xj,ijw->yxw", matrix, matrix, grid, precision="highest")
    return grid.reshape(side * side, -1)


class Resampler(nnx.Module):
    """Learned queries attend to all patches; positions are added to queries and keys."""

    def __init__(self, config: QwenVLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.text.hidden_size

        def project(out_axis: str = "heads") -> Linear:
            return Linear(width, width, bias=True, axes=("embed", out_axis), dtype=dtype, rngs=rngs)

        def table() -> nnx.Param:
            return nnx.Param(jnp.zeros((POSITIONS**2, width), dtype), axes=("position", "embed"))

        self.position, self.queries = table(), table()
        self.enter = Linear(config.layer.hidden_size, width, dtype=dtype, rngs=rngs)
        self.query_norm = LayerNorm(width, epsilon=NORM_EPS, dtype=dtype)
        self.key_norm = LayerNorm(width, epsilon=NORM_EPS, dtype=dtype)
        self.query, self.key, self.value = project(), project(), project()
        self.out = Linear(width, width, bias=True, axes=("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "images patches width"]) -> Float[Array, "images 256 out"]:
        """`enter` maps patches to the decoder's width."""
        place = self.position[...].astype(x.dtype)
        values = self.key_norm(self.enter(x))
        keys = values + resize_positions(place, round(x.shape[1] ** 0.5)).astype(x.dtype)
        queries = self.query_norm(self.queries[...].astype(x.dtype)) + place
        q, k, v = self.query(queries), self.key(keys), self.value(values)
        q = jnp.broadcast_to(q, (x.shape[0], *q.shape))
        q, k, v = (part.reshape(*part.shape[:-1], -1, HEAD_SIZE) for part in (q, k, v))
        return self.out(attend(q, k, v, None).reshape(*q.shape[:2], -1))


class QwenVision(nnx.Module):
    """Patches, positions, layers, resampler, norm and projection."""

    def __init__(self, config: QwenVLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, out = config.layer.hidden_size, config.text.hidden_size
        self.patch_size = config.patch_size
        self.patch = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), dtype=dtype, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((POSITIONS**2, width), dtype), axes=("position", "embed"))
        self.pre_norm = LayerNorm(width, epsilon=NORM_EPS, dtype=dtype)
        self.layers = stack_layers(lambda keys: VisionLayer(config.layer, dtype, keys), config.vision_layers, rngs)
        self.resampler = Resampler(config, dtype, rngs)
        self.post_norm = LayerNorm(out, epsilon=NORM_EPS, dtype=dtype)
        self.project = Linear(out, out, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(
        self, pixels: Float[Array, "images side side 3"], remat: Callable | None, attention: str
    ) -> Float[Array, "images 256 out"]:
        """256 features an image."""
        x = self.patch(patchify(pixels, self.patch_size))
        x = x + resize_positions(self.position[...], round(x.shape[1] ** 0.5)).astype(x.dtype)
        span = whole_span(x, attention)
        x = scan_layers(self.layers, self.pre_norm(x), lambda layer, x: layer(x, span), remat)
        return self.project(self.post_norm(self.resampler(x)))


class QwenVL(VisionLanguageModel):
    """The model."""

    config_class = QwenVLConfig
    length_dependent = True
    length_of_prompt = True
    counts_padding = True

    def __init__(self, config: QwenVLConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.image_token = config.image_token
        self.vision = QwenVision(config, dtype, rngs)
        self.decoder = Decoder(config.text, dtype, rngs)

    def encode_images(
        self,
        pixels: Float[Array, "batch cells height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        return each_cell(lambda cells: self.vision(cells, remat, self.attention), pixels)

    def regime(self, lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """`max(2^ceil(log2(length / trained) + 1) - 1, 1)`, in whole numbers: the doublings that reach the length."""
        if not self.config.dynamic_ntk:
            return jnp.ones(lengths.shape)
        doublings = jnp.arange(32)
        reach = self.config.trained_length * 2.0**doublings
        count = jnp.sum(lengths[..., None] > reach, axis=-1)
        return jnp.maximum(2.0 ** (count + 1) - 1, 1.0).astype(jnp.float32)

    def rope(
        self,
        positions: Int[Array, "batch tokens"],
        lengths: Int[Array, "batch tokens"] | None = None,
        *,
        train: bool = False,
    ) -> Tables:
        config, text = self.config, self.config.text
        theta: float | Array = text.rope_theta
        if lengths is not None and not train:
            theta = theta * self.regime(lengths) ** (text.head_dim / (text.head_dim - 2))
        tables = rope_tables(positions, text.head_dim, theta)
        if not config.logn_attention or train:
            return tables
        place = jnp.maximum(positions + 1, config.trained_length).astype(jnp.float32)
        return *tables, (jnp.log(place) / math.log(config.trained_length))[..., None]

    @staticmethod
    def tensors(config: QwenVLConfig) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""
        text, visual, pool = config.text, "transformer.visual", "transformer.visual.attn_pool"
        decoder, layer = _layer(text), "transformer.h.{n}"
        inner = [f"vision.resampler.{name}" for name in ("query", "key", "value")]
        rows = split_rows(1, *(text.hidden_size,) * 3)
        return [
            Tensor("vision.patch.kernel", (f"{visual}.conv1.weight",), CONV),
            Tensor("vision.position", (f"{visual}.positional_embedding",), SAME),
            *norm("vision.pre_norm", f"{visual}.ln_pre"),
            *layer_tensors(
                "vision.layers",
                f"{visual}.transformer.resblocks.{{n}}",
                _vision_layer(config.layer),
                range(config.vision_layers),
            ),
            Tensor("vision.resampler.position", (f"{pool}.pos_embed",), SAME),
            Tensor("vision.resampler.queries", (f"{pool}.query",), SAME),
            *linear("vision.resampler.enter", f"{pool}.kv_proj", bias=False),
            *norm("vision.resampler.query_norm", f"{pool}.ln_q"),
            *norm("vision.resampler.key_norm", f"{pool}.ln_kv"),
            *(
                Tensor(f"{part}.{leaf}", (f"{pool}.attn.in_proj_{name}",), turn, rows=piece)
                for part, piece in zip(inner, rows)
                for leaf, name, turn in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME))
            ),
            *linear("vision.resampler.out", f"{pool}.attn.out_proj"),
            *norm("vision.post_norm", f"{visual}.ln_post"),
            Tensor("vision.project.kernel", (f"{visual}.proj",), SAME),
            Tensor("decoder.embed.embedding", ("transformer.wte.weight",), SAME),
            *layer_tensors("decoder.layers", layer, decoder, range(text.num_layers - 1)),
            *layer_tensors("decoder.last", layer, decoder, text.num_layers - 1),
            Tensor("decoder.norm.scale", ("transformer.ln_f.weight",), SAME),
            *linear("decoder.head", "lm_head", bias=False),
        ]


ATTENTION = ("attention.query", "attention.key", "attention.value")


def _vision_layer(layer: VisionLayerConfig) -> list[Tensor]:
    """Queries, keys and values of each head lie together."""
    size = layer.hidden_size // layer.num_heads
    return [
        *norm("attention_norm", "ln_1"),
        *fused(ATTENTION, "attn.in_proj", split_rows(layer.num_heads, size, size, size), bias=True),
        *linear("attention.out", "attn.out_proj"),
        *norm("mlp_norm", "ln_2"),
        *linear("mlp.up", "mlp.c_fc"),
        *linear("mlp.down", "mlp.c_proj"),
    ]


def _layer(text: DecoderConfig) -> list[Tensor]:
    width = text.num_heads * text.head_dim
    return [
        Tensor("attention_norm.scale", ("ln_1.weight",), SAME),
        *fused(ATTENTION, "attn.c_attn", split_rows(1, width, width, width), bias=True),
        *linear("attention.out", "attn.c_proj", bias=False),
        Tensor("mlp_norm.scale", ("ln_2.weight",), SAME),
        *linear("mlp.gate", "mlp.w2", bias=False),
        *linear("mlp.up", "mlp.w1", bias=False),
        *linear("mlp.down", "mlp.c_proj", bias=False),
    ]
