"""The golden LLaVA's sequences as batches of ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from tiny import GOLDEN

from csp_jax.data.batch import CHOSEN, REJECTED, Batch, Branch, Sample, Shape
from csp_jax.models.llava import Llava

TINY, LLAVA15 = GOLDEN / "tiny_llava", GOLDEN / "llava15"
SHAPE = Shape(rows=4, prompt=12, groups=1, length=8, targets=10, responses=2, pictures=0, canvas=None)


def whole_prompts(ids: np.ndarray, mask: np.ndarray) -> Batch:
    """Sequences as prompts, padding where they have it, with a target at every position."""
    rows, length = ids.shape
    zeros = np.zeros((rows, 0), np.int32)
    everywhere = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    following = np.roll(ids, -1, axis=1).astype(np.int32)
    return Batch(
        prompt_tokens=ids.astype(np.int32),
        prompt_segment=mask.astype(np.int32),
        slot_name=np.full((*ids.shape, 1), -1, np.int32),
        tokens=zeros,
        parent=zeros,
        target_token=following,
        target_parent=everywhere,
        target_weight=np.ones(ids.shape, np.float32),
        target_response=np.zeros(ids.shape, np.int32),
        role=np.ones((rows, 1), np.int32),
        canvas=None,
        mask=None,
        confidence=np.zeros((rows, 0), np.float32),
        noise_id=np.zeros((rows, 0), np.uint32),
        groups=1,
    )


def all_logits(model: Llava, batch: Batch, pixels: np.ndarray | None) -> np.ndarray:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch, pixels: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden = model.hidden_states(batch, model.embed_prompt(batch, pixels))
        return hidden @ model.decoder.head_kernel()

    return np.asarray(run(state, batch, pixels))


def branch(ids: np.ndarray, labels: np.ndarray, start: int, role: int) -> Branch:
    marks = labels[start:] >= 0
    end = int(np.flatnonzero(marks)[-1]) + 1
    return Branch(tuple(int(i) for i in ids[start : start + end]), tuple(map(float, marks[:end])), role)


def golden_sample(io: dict[str, np.ndarray], row: int) -> Sample:
    """Chosen and rejected as two branches of what they share."""
    start = int(np.flatnonzero(io["chosen_labels"][row] >= 0)[0])
    start = min(start, int(np.flatnonzero(io["rejected_labels"][row] >= 0)[0]))
    pair = (
        branch(io["chosen_ids"][row], io["chosen_labels"][row], start, CHOSEN),
        branch(io["rejected_ids"][row], io["rejected_labels"][row], start, REJECTED),
    )
    return Sample(tuple(int(i) for i in io["chosen_ids"][row, :start]), (), (pair,))
