"""The sampler beside transformers' `generate`: greedy tokens and their log-probabilities, padded prompts, ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from live_qwen2_vl import END, IMAGE, START, shaken, torch_qwen2_vl
from PIL import Image
from tiny import IMAGE_TOKEN, SIDE, SLOTS, pack, tiny_values
from transformers import LlavaConfig as TorchLlavaConfig
from transformers import LlavaForConditionalGeneration, Qwen2VLImageProcessorPil

from csp_jax.data.batch import Batch, Picture, Sample, Shape
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.registry import load_model
from csp_jax.perturb import to_canvas
from csp_jax.rollout import Samples, Sampling, generate

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

TOKENS = 10


def theirs(model: Any, rows: list[list[int]], stop: tuple[int, ...], **pictures: Any) -> tuple[np.ndarray, ...]:
    """Greedy tokens of a batch padded on the left, their log-probabilities (0 behind the end), and their number."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **pictures,
    )
    tokens = found.sequences[:, width:]
    log_probs = torch.stack([step.log_softmax(-1) for step in found.logits], 1).gather(2, tokens[..., None])[..., 0]
    ends = torch.isin(tokens, torch.tensor(stop, dtype=torch.long))
    said = (ends.cumsum(1) - ends.int() == 0).numpy()
    room = ((0, 0), (0, TOKENS - tokens.shape[1]))
    return np.pad(tokens.numpy() * said, room), np.pad(log_probs.numpy() * said, room), said.sum(axis=1)


def ours(model: VisionLanguageModel, batch: Batch, stop: tuple[int, ...], pixels: np.ndarray | None = None) -> Samples:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch, pixels: Any) -> Samples:
        model = nnx.merge(graphdef, state)
        pixels = model.pixels(batch, to_canvas(batch.canvas)) if pixels is None else pixels
        seeds = np.zeros((len(batch.prompt_tokens), 1), np.uint32)
        return generate(model, batch, model.embed_prompt(batch, pixels), seeds, Sampling(TOKENS, 0, stop=stop))

    return jax.tree.map(np.asarray, run(state, batch, pixels))


def compare(said: Samples, wanted: tuple[np.ndarray, ...]) -> None:
    np.testing.assert_array_equal(said.tokens[:, 0], wanted[0])
    np.testing.assert_allclose(said.log_probs[:, 0], wanted[1], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(said.length[:, 0], wanted[2])


def test_llava(tmp_path: Path):
    torch.manual_seed(3)
    config = TorchLlavaConfig(**{k: v for k, v in tiny_values().items() if k != "architectures"})
    model = shaken(LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    slots = [IMAGE_TOKEN] * SLOTS
    rows = [[1, *generator.integers(4, 96, 3).tolist(), *slots, *generator.integers(4, 96, 9).tolist()]]
    rows.append([1, *slots, *generator.integers(4, 96, 4).tolist()])
    pixels = generator.standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
    seen = {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())}
    batch = pack(Shape(2, 24, 0, 0, 0, 0, 0, None), [Sample(tuple(r), (), ()) for r in rows], share_rows=False)
    wanted = theirs(model, rows, (), **seen)
    here = load_model(tmp_path)
    compare(ours(here, batch, (), pixels[:, None]), wanted)
    assert len({*map(tuple, wanted[0])}) == 2
    stop = (int(wanted[0][0, 4]), int(wanted[0][1, 0]))  # the second row ends at once
    ended = theirs(model, rows, stop, **seen)
    compare(ours(here, batch, stop, pixels[:, None]), ended)
    assert ended[2][0] <= 5
    assert ended[2][1] == 1


def test_qwen2_vl(tmp_path: Path):
    """Pictures of several shapes: text goes on behind the largest side of the last one."""
    model = torch_qwen2_vl(theta=1e4)
    model.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((84, 56), (28, 112), (56, 56))]
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    seen = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    counts = [image.shape[0] * image.shape[1] // 28**2 for image in images]
    spans = [[START, *[IMAGE] * count, END] for count in counts]
    rows = [[1, 2, *spans[0], 5, *spans[1], 7, 8, 9], [3, *spans[2], 6]]
    shown = [Picture(image, np.zeros(image.shape[:2], bool), cell=(28, 28)) for image in images]
    asked = [Sample(tuple(rows[0]), tuple(shown[:2]), ()), Sample(tuple(rows[1]), tuple(shown[2:]), ())]
    batch = pack(Shape(2, 32, 0, 0, 0, 0, 2, (28, 28), 12), asked, share_rows=False)
    width = max(map(len, rows))
    kinds = torch.tensor([[0] * (width - len(row)) + [int(t == IMAGE) for t in row] for row in rows])
    wanted = theirs(model, rows, (), mm_token_type_ids=kinds, **seen)
    compare(ours(load_model(tmp_path), batch, ()), wanted)
    assert len({*map(tuple, wanted[0])}) == 2
