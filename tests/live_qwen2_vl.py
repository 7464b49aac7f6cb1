"""A small Qwen2-VL in transformers, for tests that run beside it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

IMAGE, START, END = 93, 94, 95


def shaken(model: Any, scale: float = 0.1) -> Any:
    """Biases and norms start at 0 and 1: let them matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def torch_qwen2_vl(*, tied: bool = False, theta: float = 1e6) -> Qwen2VLForConditionalGeneration:
    """The same random weights every time."""
    torch.manual_seed(4)
    text = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [3, 2, 3]},
    }
    vision = {"depth": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 48}
    marks = {"image_token_id": IMAGE, "video_token_id": 92, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **marks)
    return shaken(Qwen2VLForConditionalGeneration(config))
