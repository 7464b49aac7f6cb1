"""How a step is computed, not what: which activations of a layer are kept, and where each kind of attention runs."""

from __future__ import annotations

from collections.abc import Callable

import jax

from csp_jax.config import TrainConfig
from csp_jax.errors import UserError
from csp_jax.models.blocks import KEPT
from csp_jax.models.interface import VisionLanguageModel

REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint,
    "dots": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable),
    "weights": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "save_names": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(KEPT)),
}
GPU, TPU = ("gpu", "cuda"), ("tpu",)
RUNS_ON = {"pallas": GPU, "cudnn": GPU, "splash": TPU}
CUDNN_HEADS = 128  # channels; more of them take a Hopper card


def check_attention(config: TrainConfig, platform: str) -> None:
    """UserError where the configured attention does not run, on these devices or at all."""
    how, shape = config.model.attention, config.data.recipe.shape
    if platform not in RUNS_ON.get(how, (platform,)):
        kind = "NVIDIA GPUs" if RUNS_ON[how] == GPU else "TPUs"
        raise UserError(f"it is for {kind}, this is a {platform}", field="model.attention", value=how, mend="Use xla")
    if how != "cudnn":
        return
    if config.model.dtype != "bfloat16":
        raise UserError(
            f"cuDNN's attention computes in half precision, not in {config.model.dtype}",
            field="model.attention",
            value=how,
            mend="Set model.dtype to bfloat16, or use pallas",
        )
    if shape.samples > 1:
        raise UserError(
            f"cuDNN's attention cannot tell the samples of a row apart, and {shape.samples} share one",
            field="model.attention",
            value=how,
            mend="Use pallas, or set data.recipe.shape.samples to 1",
        )


def check_heads(how: str, model: VisionLanguageModel) -> None:
    """UserError where the attention is not made for heads of the model's size."""
    channels = model.decoder.config.head_dim
    if how == "cudnn" and (channels > CUDNN_HEADS or channels % 8):
        raise UserError(
            f"cuDNN's attention takes heads of up to {CUDNN_HEADS} channels, a multiple of 8, not of {channels}",
            field="model.attention",
            value=how,
            mend="Use pallas",
        )
