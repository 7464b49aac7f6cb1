"""From pictures to log-probabilities: what the originals say about them, with all cases of a family in one row."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden_folders import FAMILIES, unpack
from PIL import Image
from safetensors.numpy import load_file
from scipy.special import log_softmax
from tiny import pack

from csp_jax.data.batch import Branch, Sample, Shape
from csp_jax.data.pictures import check_slots, show
from csp_jax.families.registry import open_family
from csp_jax.losses.logprobs import score
from csp_jax.models.hub import HubConfig
from csp_jax.models.registry import load_model
from csp_jax.parity.golden import picture_slots
from csp_jax.perturb import to_canvas

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.slow]

CASES = {
    "llava": ["single"],
    "qwen2_vl": ["batch_leftpad"],
    "internvl2": ["two_images", "single"],
    "qwen_vl": ["two_images_ntk"],
    "phi3_vision": ["crossing_short_to_long"],
}
# The original's reference was computed from pixel values in half precision.
TOLERANCE = {"phi3_vision": 2e-3}
TAIL = 3  # tokens behind the last picture that are scored as a branch


def rows_of(folder: Path, family: str, case: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per row of a case: token ids, where features go, log-probabilities [length, vocabulary]; padding removed."""
    tensors, entry = load_file(folder / f"{case}.safetensors"), json.loads((folder / "cases.json").read_text())[case]
    host = open_family(folder, words=False)
    images = [image_of(folder, name) for name in entry.get("images", entry.get("pixels"))]
    features = sum(host.image_tokens(host.canvas(image)) for image in images)
    ids, mask = tensors["input_ids"], tensors["attention_mask"] > 0
    slots = picture_slots(family, HubConfig.read(folder), ids, features)
    logits = log_softmax(tensors["logits"].astype(np.float64), axis=-1)
    return [(ids[n][mask[n]], slots[n][mask[n]], logits[n][mask[n]]) for n in range(len(ids))]


def image_of(folder: Path, name: str) -> Image.Image:
    return Image.fromarray(load_file(folder / f"{name}.safetensors")["image_u8"])


@pytest.mark.parametrize("family", CASES)
def test_pictures_are_scored_as_the_original_scores_them(family, tmp_path):
    folder = unpack(FAMILIES[family], tmp_path)
    host, model = open_family(folder, words=False), load_model(folder)
    entries = json.loads((folder / "cases.json").read_text())
    samples, wanted = [], []
    for case in CASES[family]:
        names = list(entries[case].get("images", entries[case].get("pixels")))
        for ids, slots, log_probs in rows_of(folder, family, case):
            pictures, left = [], int(slots.sum())
            while left:
                pictures.append(show(host, image_of(folder, names.pop(0))))
                left -= host.image_tokens(pictures[-1].canvas)
            start = len(ids) - TAIL
            prompt = tuple(np.where(slots, host.image_token, ids)[:start].tolist())
            tail = tuple(ids[start:].tolist())
            branch = Branch(tail, (1.0,) * TAIL)
            samples.append(check_slots(host, Sample(prompt, tuple(pictures), ((branch,),))))
            wanted.append(log_probs[np.arange(start - 1, len(ids) - 1), ids[start:]])
    shape = Shape(
        rows=1,
        prompt=sum(len(sample.prompt) for sample in samples) + 5,
        groups=len(samples),
        length=TAIL,
        targets=TAIL,
        responses=len(samples),
        pictures=sum(len(sample.pictures) for sample in samples),
        canvas=host.cell,
        cells=sum(picture.cells for sample in samples for picture in sample.pictures) + 2,
    )
    batch = pack(shape, samples)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: object) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return score(model, batch, model.pixels(batch, to_canvas(batch.canvas))).log_probs

    found = np.asarray(run(state, batch))[0].reshape(len(samples), TAIL)
    np.testing.assert_allclose(found, np.stack(wanted), atol=TOLERANCE.get(family, 1e-4), rtol=0)
