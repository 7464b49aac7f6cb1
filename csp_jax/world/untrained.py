"""The tiny LLaVA that a world's base starts from: sizes and tokenizer, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from csp_jax.families.interface import IMAGE_MARK
from csp_jax.world.config import WorldConfig
from csp_jax.world.tokenizer import SPECIAL, build_tokenizer

SLOTS = 8  # picture slots along a side
WIDTH, HEADS = 160, 5


def base_config(canvas: int, vocab_size: int) -> dict[str, Any]:
    """`config.json` of the base in the hub's layout, for square pictures of `canvas` pixels a side."""
    if canvas % SLOTS:
        raise UserError(
            "a base reads its pictures in 8 by 8 patches", field="canvas", value=canvas, mend="Use a multiple of 8"
        )
    pad = SPECIAL.index("<pad>")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": SPECIAL.index(IMAGE_MARK),
        "image_seq_length": SLOTS**2,
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 416,
            "num_hidden_layers": 4,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "bos_token_id": SPECIAL.index("<s>"),
            "eos_token_id": SPECIAL.index("</s>"),
            "pad_token_id": pad,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 480,
            "num_hidden_layers": 5,
            "num_attention_heads": HEADS,
            "num_channels": 3,
            "image_size": canvas,
            "patch_size": canvas // SLOTS,
            "projection_dim": WIDTH,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
        },
    }


def write_untrained(config: WorldConfig, folder: Path) -> None:
    """The folder that `model: {checkpoint: FOLDER, random_init: true}` starts a world's base from."""
    tokenizer = build_tokenizer(config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = base_config(config.canvas, tokenizer.get_vocab_size())
    (folder / "config.json").write_text(json.dumps(values, indent=2))
