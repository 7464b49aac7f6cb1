"""SAM's published weights (segment-anything's names) as a transformers SamModel, for machines without torchvision."""

from __future__ import annotations

import re
from typing import Any

import torch

from csp_jax.errors import UserError

# segment-anything's name -> transformers'. The first that matches counts.
NAMES = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.norm(\d)\.", r"mask_decoder.transformer.layers.\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
)
HEAD = re.compile(r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.(\d+)\.(.+)$")
POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
DECODER_HEADS = 8  # of all published checkpoints; the shapes do not tell


def _renamed(name: str, depth: dict[str, int]) -> str:
    head = HEAD.match(name)
    if head:
        stem, place, rest = head[1], int(head[2]), head[3]
        last = depth[stem] - 1
        part = "proj_in" if place == 0 else "proj_out" if place == last else f"layers.{place - 1}"
        return f"{stem}.{part}.{rest}"
    for pattern, instead in NAMES:
        renamed, hits = re.subn(pattern, instead, name)
        if hits:
            return renamed
    return name


def sam_config(state: dict[str, torch.Tensor], decoder_heads: int = DECODER_HEADS) -> Any:
    """The SamConfig of a checkpoint, read from its shapes."""
    from transformers import SamConfig

    blocks = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("image_encoder.blocks."))
    grid, hidden = state["image_encoder.pos_embed"].shape[1], state["image_encoder.pos_embed"].shape[3]
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    reach = [(state[f"image_encoder.blocks.{n}.attn.rel_pos_h"].shape[0] + 1) // 2 for n in range(blocks)]
    windows = [size for size in reach if size != grid]
    width = state["prompt_encoder.no_mask_embed.weight"].shape[1]
    decoder = {
        "hidden_size": width,
        "mlp_dim": state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
        "num_attention_heads": decoder_heads,
        "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
    }
    vision = {
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1],
        "image_size": grid * patch,
        "patch_size": patch,
        "window_size": windows[0] if windows else 0,
        "global_attn_indexes": [n for n, size in enumerate(reach) if size == grid],
        "output_channels": width,
        "mlp_dim": state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
        "num_pos_feats": state[POSITIONS].shape[1],
    }
    prompt = {
        "hidden_size": width,
        "image_size": grid * patch,
        "patch_size": patch,
        "image_embedding_size": grid,
        "mask_input_channels": state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
    }
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def sam_model(state: dict[str, torch.Tensor], file: str, decoder_heads: int = DECODER_HEADS) -> Any:
    """The model of a checkpoint in segment-anything's names; UserError for missing, unknown or misshapen tensors."""
    from transformers import SamModel

    try:
        config = sam_config(state, decoder_heads)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"is no SAM checkpoint ({error!r})", file=file, mend="Use sam_vit_{b,l,h}_*.pth") from None
    depth: dict[str, int] = {}
    for name in state:
        if head := HEAD.match(name):
            depth[head[1]] = max(depth.get(head[1], 0), int(head[2]) + 1)
    renamed = {_renamed(name, depth): tensor for name, tensor in state.items() if name != POSITIONS}
    for place in ("shared_image_embedding", "prompt_encoder.shared_embedding"):
        renamed[f"{place}.positional_embedding"] = state[POSITIONS]
    model = SamModel(config)
    try:
        model.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"does not fit SAM ({problem})", file=file, mend="Download the checkpoint again") from None
    return model
