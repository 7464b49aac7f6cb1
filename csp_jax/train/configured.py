"""What a configuration says of a step: loss, noise, optimizer, recomputation, attention; and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from csp_jax.config import NoiseConfig, OptimizerConfig, TrainConfig
from csp_jax.errors import UserError
from csp_jax.losses.grounding import NoLoss
from csp_jax.losses.grpo import VARIANTS, GrpoLoss
from csp_jax.losses.interface import Loss
from csp_jax.losses.sft import SftLoss
from csp_jax.losses.simpo import SimpoLoss
from csp_jax.models.blocks import KEPT
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import Schedule
from csp_jax.sharding import PMAP_AXIS, layer_wrapper, row_shards
from csp_jax.train.state import decay_mask
from csp_jax.train.step import Step, make_step

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


def make_loss(config: TrainConfig) -> Loss:
    """The configured loss."""
    loss = config.loss
    if loss.name == "sft":
        return SftLoss()
    if loss.name == "grounding":
        return NoLoss()
    if loss.name == "grpo":
        variant = VARIANTS[loss.variant]
        return GrpoLoss(
            loss.clip_low, loss.clip_high, loss.kl_beta, loss.kl, longest=config.rollout.max_tokens, **variant
        )
    return SimpoLoss(loss.beta, loss.simpo_gamma, loss.nll_weight, loss.label_smoothing, loss.retention)


def make_schedule(config: NoiseConfig) -> Schedule:
    """The configured noise."""
    return Schedule(config.name, config.t_max, config.noise_gamma, config.floor)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, decay and clipping; norms and biases are not decayed."""
    peak, warmup = config.learning_rate, math.ceil(config.warmup_ratio * steps)
    last = peak * config.final_ratio
    decay = max(steps - warmup, 1)
    tail = {
        "cosine": optax.cosine_decay_schedule(peak, decay, config.final_ratio),
        "linear": optax.linear_schedule(peak, last, decay),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    schedule = optax.join_schedules([rise, tail], [warmup]) if warmup else tail
    adam = optax.adamw(
        schedule,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip_by_norm(config.clip), adam) if config.clip else adam


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with one factor for all gradients.

    A factor is applied where the moments read a gradient. A quotient, which optax takes, XLA computes beforehand: on
    CPU it then writes all gradients to memory and reads them three times.
    """

    def update(gradients: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        factor = limit / jnp.maximum(optax.global_norm(gradients), limit)
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def configured_step(
    config: TrainConfig, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Step:
    """The training step as a configuration says, not yet compiled."""
    remat, mapped = REMAT[config.model.remat], config.parallel.strategy == "pmap"
    return make_step(
        graphdef,
        make_loss(config),
        optimizer,
        schedule=make_schedule(config.noise),
        seed=config.seed,
        dtype=jnp.dtype(config.model.dtype),
        remat=remat if mapped else layer_wrapper(mesh, remat),
        head_chunk=config.model.head_chunk * (1 if mapped else row_shards(mesh)),
        grounding=config.loss.grounding,
        axis=PMAP_AXIS if mapped else None,
    )


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
