"""The comparisons: import, export, adapters, preprocessing, token counts, image features, logits, greedy decoding.

Everything is computed in float32 with full-precision products; logits count only where the attention mask is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch, Packer, Sample, Shape
from csp_jax.errors import UserError
from csp_jax.models.attention import tree_layout
from csp_jax.models.hub import HubConfig, HubFolder, differing_tensors
from csp_jax.models.interface import Places, VisionLanguageModel
from csp_jax.models.registry import load_model
from csp_jax.parity.adapters import check_adapter
from csp_jax.parity.golden import Golden, GoldenPicture, case_batch, with_chain
from csp_jax.perturb import to_canvas

TOLERANCE = 1e-4  # of logits, and of features in units of their standard deviation where that is above 1
PIXEL_TOLERANCE = 1e-5  # of normalized pixel values; one step of 1/255 is about 0.015
HALF_TOLERANCE = 2e-3  # of pixel values that the reference holds in half precision


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute difference, or how many differ; None where it was not made."""

    folder: str
    family: str
    case: str
    what: str
    difference: float | None
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is None or self.difference <= self.limit

    def row(self) -> dict[str, Any]:
        """For tables and JSON."""
        verdict = "skipped" if self.difference is None else "ok" if self.passed else "differs"
        return {**dataclasses.asdict(self), "verdict": verdict}


class Original:
    """A model in the passes that the original makes: whole padded batches at once."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def embed(state: nnx.State, batch: Batch, pixels: Array | None) -> Array:
            return nnx.merge(graphdef, state).embed_prompt(batch, pixels)

        @jax.jit
        def logits(state: nnx.State, batch: Batch, prompt: Array) -> Array:
            model = nnx.merge(graphdef, state)
            hidden = model.hidden_states(batch, prompt, places=places_of_pass(model, batch))
            return hidden @ model.decoder.head_kernel()

        self._embed, self._logits = embed, logits

    def embed(self, batch: Batch, pixels: np.ndarray | None) -> Float[Array, "rows length width"]:
        """Prompt embeddings, image features in their slots."""
        return self._embed(self._state, batch, pixels)

    def logits(self, batch: Batch, prompt: Array) -> Float[Array, "rows targets vocab"]:
        """At the parents of the targets."""
        return self._logits(self._state, batch, prompt)

    def greedy(self, batch: Batch, prompt: Array, steps: int) -> Int[np.ndarray, "rows steps"]:
        """The likeliest token at every step."""
        chain = with_chain(batch, steps)
        said = np.zeros((len(chain.tokens), steps), np.int32)
        for step in range(steps):
            fed = dataclasses.replace(chain, tokens=said[:, : steps - 1].copy())
            said[:, step] = np.asarray(self.logits(fed, prompt)[:, step].argmax(axis=-1))
        return said


def places_of_pass(model: VisionLanguageModel, batch: Batch) -> Places:
    """Positions and lengths in the original's passes: every row counts as long as the padded batch."""
    layout = tree_layout(batch.prompt_segment, batch.parent, batch.groups)
    positions, following = model.positions(batch)
    size = following.shape[1]
    if model.counts_padding:
        positions = jnp.broadcast_to(jnp.arange(size), following.shape)
        following = positions + 1
    branch = jnp.take_along_axis(following, layout.root, axis=1) + layout.depth - 1
    fed = jnp.full(branch.shape[1], size) if model.length_of_prompt else size + jnp.arange(1, branch.shape[1] + 1)
    return Places(positions, branch, jnp.full(following.shape, size), jnp.broadcast_to(fed, branch.shape))


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0.0))


def check_picture(model: VisionLanguageModel, picture: GoldenPicture) -> Iterator[tuple[str, float, float]]:
    """The number of views and their pixel values: (what, difference, limit)."""
    shown, references = picture.shown, [part for part in (picture.whole, picture.sparse) if part is not None]
    surplus = max((abs(len(part) - shown.cells) for part in references), default=0)
    yield "views", float(surplus), 0.0
    if surplus:
        return
    packer = Packer(Shape(1, 1, 1, 0, 0, 1, 1, shown.cell, shown.cells))
    packer.add(Sample((0,), (shown,), ()))
    batch = packer.batch
    pixels = np.asarray(model.pixels(batch, to_canvas(jnp.asarray(batch.canvas))))[0]
    if picture.whole is not None:
        yield "pixels", _largest(pixels - picture.whole), HALF_TOLERANCE if picture.half else PIXEL_TOLERANCE
    if picture.sparse is not None:
        yield "pixels, every 7th", _largest(pixels[:, ::7, ::7] - picture.sparse), PIXEL_TOLERANCE


def check_sequences(original: Original, golden: Golden, case: str) -> Iterator[tuple[str, float, float]]:
    """Image features, logits and greedy tokens of a case: (what, difference, limit)."""
    wanted = golden.tensors(case)
    batch, pixels = case_batch(golden, case, original.model.image_token)
    prompt = original.embed(batch, pixels)
    slots = np.asarray(original.model.slots(batch))
    for name, stride in (("image_embeds", 1), ("image_features_stride16", 16)):
        if name in wanted:
            reference, features = wanted[name], np.asarray(prompt)[slots]
            if stride > 1:  # of each picture
                features = features.reshape(len(reference), -1, reference.shape[-1])[:, ::stride]
            scale = max(1.0, float(reference.std()))
            yield "features", _largest(features.reshape(reference.shape) - reference) / scale, TOLERANCE
    seen = batch.prompt_segment > 0
    logits = np.asarray(original.logits(batch, prompt))
    yield "logits", _largest(logits[seen] - wanted["logits"][seen]), TOLERANCE
    if "generated" in wanted:
        said = original.greedy(batch, prompt, wanted["generated"].shape[1])
        yield "greedy", float(np.sum(said != wanted["generated"])), 0.0


def check_folder(directory: Path) -> Iterator[Check]:
    """Every check of a folder; what cannot be read is a check that fails, with the reason."""
    golden = Golden(directory)

    def check(case: str, what: str, difference: float | None, limit: float, note: str = "") -> Check:
        return Check(directory.name, golden.family, case, what, difference, limit, note)

    model = load_model(directory)
    folder = HubFolder(directory, type(model).aliases)
    yield check("", "import", 0.0, 0.0, f"{len(folder.where)} tensors")
    different = differing_tensors(folder, nnx.state(model), type(model).tensors(model.config))
    yield check("", "export", float(different), 0.0, "tensors whose bytes differ")
    for what, difference, limit in check_adapter(model):
        yield check("", what, difference, limit)
    originals: dict[str, Original] = {}
    for case, entry in golden.cases.items():
        if entry.get("videos") or "frames_u8" in entry.get("tensors", {}):
            yield check(case, "video", None, 0.0, "videos are not supported")
            continue
        try:
            if str(entry.get("kind", "")).startswith("preprocess"):
                found = check_picture(model, golden.picture(case))
            else:
                found = check_sequences(_original(originals, golden, case), golden, case)
            for what, difference, limit in found:
                yield check(case, what, difference, limit)
        except UserError as error:
            yield check(case, "cannot be compared", 1.0, 0.0, str(error))


def _original(known: dict[str, Original], golden: Golden, case: str) -> Original:
    """The model of a case's configuration, loaded once."""
    config: HubConfig = golden.overridden(case)
    name = repr(config.values)
    if name not in known:
        known[name] = Original(load_model(golden.directory, config=config))
    return known[name]


def parity(directories: list[Path]) -> list[Check]:
    """The checks of several folders, in full precision."""
    checks: list[Check] = []
    with jax.default_matmul_precision("highest"):
        for directory in directories:
            try:
                checks += check_folder(directory)
            except UserError as error:
                checks.append(Check(directory.name, "", "", "import", 1.0, 0.0, str(error)))
    return checks


COLUMNS = {  # of the summary: the checks that each one takes together
    "import": ("import",),
    "export": ("export",),
    "pixels": ("views", "pixels", "pixels, every 7th"),
    "features": ("features",),
    "logits": ("logits",),
    "greedy": ("greedy",),
    "LoRA": ("adapter", "adapter, merged"),
}


def summary(checks: list[Check]) -> str:
    """A Markdown table: the largest difference of each folder and kind of check, **bold** where it is past its limit.

    Pixel values that the reference holds in half precision are left to those in full precision.
    """
    lines = [f"| folder | family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for folder in dict.fromkeys(check.folder for check in checks):
        own = [check for check in checks if check.folder == folder and check.limit != HALF_TOLERANCE]
        cells = []
        for names in COLUMNS.values():
            some = [check for check in own if check.what in names and check.difference is not None]
            worst = max((check.difference or 0.0 for check in some), default=None)
            text = "–" if worst is None else "exact" if worst == 0 else f"{worst:.1e}"
            cells.append(text if all(check.passed for check in some) else f"**{text}**")
        lines.append(f"| {folder} | {own[0].family if own else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)
