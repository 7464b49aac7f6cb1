"""Small LLaVA models, batches and folders that several test files share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from csp_jax.data.batch import Batch, Packer, Picture, Sample, Shape
from csp_jax.losses.logprobs import Scores, score
from csp_jax.models.hub import HubConfig
from csp_jax.models.llava import Llava
from csp_jax.models.registry import abstract_model

GOLDEN = Path(__file__).parent / "golden"
IMAGE_TOKEN = 3
SIDE, SLOTS = 28, 4  # of tiny canvases, and the picture slots that one fills


def tiny_values(**text: Any) -> dict[str, Any]:
    """`config.json` of a LLaVA with grouped queries, three decoder layers and a tower layer that is not used."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": SLOTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 14,
            "projection_dim": 24,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    }


def random_leaf(path: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Kernels that keep the size of what they map; scales about 1; nothing at 0, so that everything matters."""
    noise = generator.standard_normal(shape).astype(np.float32)
    if path.endswith(".kernel"):
        return noise * np.float32(shape[-2] ** -0.5)
    return np.float32(path.endswith(".scale")) + np.float32(0.05) * noise


def tiny_model(seed: int = 0, **text: Any) -> Llava:
    """A random model of `tiny_values`."""
    graphdef, state = nnx.split(abstract_model(HubConfig(tiny_values(**text), Path("config.json"))))
    generator = np.random.default_rng(seed)
    filled = [
        (path, leaf.replace(jnp.asarray(random_leaf(".".join(map(str, path)), leaf.get_value().shape, generator))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def jitted_score(model: Llava, batch: Batch, pixels: Any) -> Scores:
    """`losses.logprobs.score`, compiled."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, batch, pixels: score(nnx.merge(graphdef, state), batch, pixels))
    return run(state, batch, pixels)


def random_canvas(generator: np.random.Generator, side: int = SIDE) -> np.ndarray:
    return generator.integers(0, 256, (side, side, 3), dtype=np.uint8)


def random_picture(generator: np.random.Generator, confidence: float = 100.0) -> Picture:
    """A picture whose left half may be buried."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 2] = True
    return Picture(random_canvas(generator), mask, confidence, int(generator.integers(2**32)))


def pack(shape: Shape, samples: Iterable[Sample], *, share_rows: bool = True) -> Batch:
    """A batch that must hold every sample."""
    packer = Packer(shape)
    for sample in samples:
        assert packer.add(sample, share_rows=share_rows) is not None
    return packer.batch


def stack(batches: list[Batch]) -> Batch:
    """Micro-batches as an accumulation window."""
    arrays = {name: np.stack([getattr(batch, name) for batch in batches]) for name in Batch.ARRAYS}
    return Batch(**arrays, groups=batches[0].groups)


def change(batch: Batch, **arrays: Any) -> Batch:
    return dataclasses.replace(batch, **arrays)


def difference(a: Any, b: Any) -> float:
    """Norm of the difference of two trees of arrays, relative to the norm of the second."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    gap = sum(float(np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2)) for x, y in pairs)
    size = sum(float(np.sum(np.asarray(y, np.float64) ** 2)) for _, y in pairs)
    return (gap / size) ** 0.5


def write_folder(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Path:
    """A checkpoint folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
