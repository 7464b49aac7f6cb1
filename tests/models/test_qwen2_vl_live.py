"""Qwen2-VL beside transformers: the same numbers from the same pictures, and checkpoints that both can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_qwen2_vl import END, IMAGE, START, torch_qwen2_vl
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import jitted_score, pack
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from csp_jax.data.batch import Branch, Sample, Shape
from csp_jax.data.pictures import check_slots, show
from csp_jax.errors import UserError
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model, save_model
from csp_jax.perturb import to_canvas

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

MOST_PIXELS = 28 * 28 * 12
SIZES = ((90, 70), (40, 130), (60, 60))  # width, height


def pictures(seed: int) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def write_processor(folder: Path) -> Path:
    """The folder of a model that transformers saved, with the limits of its pictures."""
    limits = {"min_pixels": 28 * 28 * 2, "max_pixels": MOST_PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return folder


def torch_log_probs(model: Qwen2VLForConditionalGeneration, row: list[int], images: list[Image.Image]) -> np.ndarray:
    """Of every token of a row but the first; `row` has one image mark a picture, to be expanded."""
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 2, max_pixels=MOST_PIXELS)
    seen = processor(images, return_tensors="pt")
    counts = iter((seen["image_grid_thw"].prod(dim=1) // 4).tolist())
    tokens = torch.tensor([[t for token in row for t in [token] * (next(counts) if token == IMAGE else 1)]])
    with torch.no_grad():
        logits = model(input_ids=tokens, mm_token_type_ids=(tokens == IMAGE).int(), **seen).logits[0].log_softmax(-1)
    return logits[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]].numpy()


def our_log_probs(folder: Path, row: list[int], images: list[Image.Image]) -> np.ndarray:
    """Of what follows the last picture's slots, as a branch."""
    family, model = open_family(folder, words=False), load_model(folder)
    shown = [show(family, image) for image in images]
    counts = iter(family.image_tokens(picture.canvas) for picture in shown)
    last = max(place for place, token in enumerate(row) if token == IMAGE)
    prompt = tuple(t for token in row[: last + 1] for t in [token] * (next(counts) if token == IMAGE else 1))
    tail = tuple(row[last + 1 :])
    sample = check_slots(family, Sample(prompt, tuple(shown), ((Branch(tail, (1.0,) * len(tail)),),)))
    batch = pack(Shape(1, 48, 1, 8, 8, 1, 3, family.cell, 40), [sample])
    pixels = model.pixels(batch, to_canvas(batch.canvas))
    return np.asarray(jitted_score(model, batch, pixels).log_probs)[0, : len(tail)]


ROWS: list[tuple[list[int], slice]] = [
    ([1, START, IMAGE, END, 7, 8, 9, 10], slice(0, 1)),
    ([1, 2, START, IMAGE, END, START, IMAGE, END, 7, 8], slice(0, 2)),
    ([3, START, IMAGE, END, 5, START, IMAGE, END, START, IMAGE, END, 6, 7], slice(0, 3)),
]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_transformers_and_we_read_each_other(tmp_path, tied):
    theirs = torch_qwen2_vl(tied=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    folder = write_processor(tmp_path / "theirs")
    images = pictures(0)
    wanted = [torch_log_probs(theirs, row, images[some]) for row, some in ROWS]
    for (row, some), want in zip(ROWS, wanted):
        found = our_log_probs(folder, row, images[some])
        np.testing.assert_allclose(found, want[-len(found) :], atol=1e-5, rtol=1e-5)

    ours = tmp_path / "ours"
    save_model(ours, load_model(folder))
    (ours / "config.json").write_text((folder / "config.json").read_text())
    stored = load_file(ours / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"model", "visual"} | (set() if tied else {"lm_head"})
    back, notes = Qwen2VLForConditionalGeneration.from_pretrained(ours, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    row, some = ROWS[1]
    np.testing.assert_array_equal(torch_log_probs(back.eval(), row, images[some]), wanted[1])


def test_a_repeated_head_is_accepted_and_written_again(tmp_path):
    """Some tied checkpoints hold the embedding twice; another head beside a tied one is an error."""
    theirs = torch_qwen2_vl(tied=True)
    theirs.save_pretrained(tmp_path / "theirs")
    folder = tmp_path / "theirs"
    arrays: dict[str, Any] = load_file(folder / "model.safetensors")
    embed = next(value for name, value in arrays.items() if name.endswith("embed_tokens.weight"))
    save_file({**arrays, "lm_head.weight": embed.copy()}, folder / "model.safetensors", metadata={"format": "pt"})
    save_model(tmp_path / "ours", load_model(folder))
    np.testing.assert_array_equal(load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"], embed)
    save_file({**arrays, "lm_head.weight": embed + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs from") as caught:
        load_model(folder)
    assert caught.value.field == "lm_head.weight"
