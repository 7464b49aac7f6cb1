"""Jitted evaluation sweeps: every item of a split once, in fixed shapes, over all devices and hosts."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from csp_jax.calibration.protocols import (
    AskItem,
    QuestionTexts,
    Reading,
    question_texts,
    question_trees,
    read_question,
    read_texts,
)
from csp_jax.data.batch import Batch, Packer
from csp_jax.data.buckets import Buckets, alike
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily
from csp_jax.losses.logprobs import score
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.records import Item, Record
from csp_jax.rollout import Sampling, continue_batch, end_token
from csp_jax.scenes import SceneTrees, scene_trees, shape_of
from csp_jax.sharding import gather_bytes, put_batch
from csp_jax.text import Prompts

PATIENCE = 16  # batches that a compilation has to serve
SUBSETS = ("random", "popular", "adversarial", "attribute", "relation")


@dataclasses.dataclass
class Answers:
    """What a model said to every item of a split (n items, two or more candidates each)."""

    ids: list[str]
    image_ids: list[str]
    categories: list[str]
    subsets: Bool[np.ndarray, "n subsets"]
    truth: Int[np.ndarray, " n"]
    greedy: Float[np.ndarray, "n candidates"]
    expected: Float[np.ndarray, "n candidates"]
    direct: Int[np.ndarray, " n"]
    direct_log_probs: Float[np.ndarray, "n candidates"]

    def write(self, out: Path | BinaryIO) -> None:
        """Write as npz."""
        np.savez_compressed(
            out,
            ids=np.array(self.ids),
            image_id=np.array(self.image_ids),
            category=np.array(self.categories),
            split_mask=self.subsets,
            split_names=np.array(SUBSETS),
            truth=self.truth,
            confidence=self.expected,
            greedy=self.greedy,
            direct=self.direct,
            direct_log_probs=self.direct_log_probs,
        )

    def save(self, file: Path) -> None:
        """Write as a file, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".partial.npz")
        self.write(temporary)
        temporary.rename(file)

    @classmethod
    def load(cls, file: Path | BinaryIO) -> Answers:
        """Read what `save` or `write` wrote."""
        with np.load(file) as found:
            return cls(
                ids=found["ids"].tolist(),
                image_ids=found["image_id"].tolist(),
                categories=found["category"].tolist(),
                subsets=found["split_mask"],
                truth=found["truth"],
                greedy=found["greedy"],
                expected=found["confidence"],
                direct=found["direct"],
                direct_log_probs=found["direct_log_probs"],
            )

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Parts one after the other."""
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            chained = isinstance(values[0], list)
            columns[field.name] = list(itertools.chain(*values)) if chained else np.concatenate(values)
        return cls(**columns)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _score(
    graphdef: nnx.GraphDef[VisionLanguageModel], state: nnx.State, batch: Batch, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    scores = score(model, batch, model.clean_pixels(batch), dtype=dtype)
    return scores.log_probs, scores.top_token


class Scorer:
    """A scoring pass of one model; models of one structure and batches of one shape share a compilation."""

    read = staticmethod(read_question)

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, dtype: jnp.dtype = jnp.float32):
        self.mesh, self.dtype = mesh, jnp.dtype(dtype)
        self._graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, NamedSharding(mesh, P()))

    def __call__(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Log-probabilities of all targets' choices and the model's own tokens there, on the device."""
        return _score(self._graphdef, self._state, put_batch(batch, self.mesh, leading=0), dtype=self.dtype)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The program of a pass, not yet compiled."""
        return _score.lower(self._graphdef, self._state, put_batch(batch, self.mesh, leading=0), dtype=self.dtype)


class Speaker:
    """What a model says, likeliest tokens first, behind every target: what `question_texts` asks, in words."""

    def __init__(
        self, model: VisionLanguageModel, family: HostFamily, mesh: Mesh, most: int, dtype: jnp.dtype = jnp.float32
    ):
        self.mesh, self.dtype = mesh, jnp.dtype(dtype)
        self._tokenizer, self._end = family.tokenizer, end_token(family)
        self.sampling = Sampling(most, temperature=0.0, stop=(self._end,))
        graphdef, state = nnx.split(model)
        self._continue = functools.partial(continue_batch, graphdef, self.sampling, self.dtype)
        self._state = jax.device_put(state, NamedSharding(mesh, P()))

    def __call__(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Tokens of all texts, zeros behind their ends, and how many each has."""
        samples = self._continue(self._state, put_batch(batch, self.mesh, leading=0))
        return samples.tokens, samples.length

    def read(self, question: QuestionTexts, *results: np.ndarray) -> Reading:
        """What the texts of a question's one tree say."""
        (tokens,), (lengths,) = results
        said = [row[:length].tolist() for row, length in zip(tokens, lengths)]
        texts = [self._tokenizer.decode([token for token in text if token != self._end]) for text in said]
        return read_texts(question, texts[: 1 + len(question.candidates)])


Asking = Scorer | Speaker  # a pass over a batch of scenes on the device, and what its results [rows, targets, ...] mean
PROTOCOLS: dict[str, AskItem] = {"exact": question_trees, "verbal": question_texts}


def open_asking(model: VisionLanguageModel, family: HostFamily, scenes: Sequence[SceneTrees], mesh: Mesh) -> Asking:
    """How a model is asked the questions of scenes, as one of `PROTOCOLS` put them."""
    most = max((question.tail for scene in scenes for question in scene.questions), default=0)
    return Speaker(model, family, mesh, most) if most else Scorer(model, mesh)


def evaluate(
    asking: Asking,
    scenes: Sequence[SceneTrees],
    *,
    rows: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Ask a model every question of the scenes (see `open_scenes`), each once.

    Each host asks its own scenes on its own devices, which the mesh of `asking` spans, `rows` scenes at a time; all
    hosts return all answers, in the order of the hosts and their scenes.
    """
    # Hosts meet here, before they compile: CPU collectives wait long for a host that they know, not for a first one.
    if not multihost_utils.process_allgather(np.array(len(scenes))).any():
        raise UserError("there is no question with answers to choose from", mend="Check the split and the limit")
    return gathered(_ask_scenes(asking, scenes, rows, progress) if scenes else None)


def _ask_scenes(
    asking: Asking, scenes: Sequence[SceneTrees], rows: int, progress: Callable[[int, int], None] | None
) -> Answers:
    """What the scenes' questions are answered with."""
    shape = shape_of([scene.sample for scene in scenes], rows)
    found: dict[int, list[tuple[Record, Item, Reading]]] = {}
    for number, (chunk, results) in enumerate(_sweep(asking, Buckets(shape, PATIENCE), scenes)):
        asked = [scenes[place] for place in chunk]
        for place, scene, readings in zip(chunk, asked, _readings(asking, asked, results, shape.targets), strict=True):
            found[place] = [(scene.record, *pair) for pair in zip(scene.items, readings, strict=True)]
        if progress:
            progress((number + 1) * rows, len(scenes))
    return collect([answer for place in range(len(scenes)) for answer in found[place]])


def gathered(answers: Answers | None) -> Answers:
    """The answers of all hosts, on each; None where a host has none."""
    if answers is not None and jax.process_count() == 1:
        return answers
    own = io.BytesIO()
    if answers is not None:
        answers.write(own)
    parts = [Answers.load(io.BytesIO(part)) for part in gather_bytes(own.getvalue()) if part]
    return Answers.joined(parts)


def ask_records(
    scorer: Scorer, family: HostFamily, prompts: Prompts, records: Sequence[Record], item: Item
) -> list[Reading]:
    """What a model says to one question about each of several pictures, in one batch."""
    scenes = [scene_trees(family, prompts, record, (item,)) for record in records]
    whole = shape_of([scene.sample for scene in scenes], len(scenes))
    ((chunk, result),) = _sweep(scorer, Buckets(whole), scenes)
    asked = [scenes[place] for place in chunk]
    readings = dict(zip(chunk, _readings(scorer, asked, result, whole.targets), strict=True))
    return [readings[place][0] for place in range(len(scenes))]


def _readings(
    asking: Asking, scenes: Sequence[SceneTrees], results: tuple[jax.Array, ...], targets: int
) -> Iterator[list[Reading]]:
    """What a model says to each question of scenes that were asked one a row, so many `targets` to a tree."""
    by_tree = [np.asarray(x).reshape(len(x), -1, targets, *x.shape[2:]) for x in jax.device_get(results)]
    for scene, *own in zip(scenes, *by_tree):
        ends = itertools.accumulate(len(question.trees) for question in scene.questions)
        yield [
            asking.read(question, *(x[end - len(question.trees) : end] for x in own))
            for question, end in zip(scene.questions, ends)
        ]


def _sweep(
    asking: Asking, buckets: Buckets, scenes: Sequence[SceneTrees]
) -> Iterator[tuple[list[int], tuple[jax.Array, ...]]]:
    """Ask scenes (by their numbers) in chunks of like ones; the next is on its way before the last one is read."""
    waiting: tuple[list[int], tuple[jax.Array, ...]] | None = None
    for chunk in alike([scene.sample for scene in scenes], buckets.whole.rows):
        samples = [scenes[place].sample for place in chunk]
        packer = Packer(buckets(samples))
        for sample in samples:
            packer.add(sample, share_rows=False)
        result = asking(packer.batch)
        if waiting is not None:
            yield waiting
        waiting = (chunk, result)
    if waiting is not None:
        yield waiting


def collect(found: list[tuple[Record, Item, Reading]]) -> Answers:
    """Readings as arrays."""
    items = [item for _, item, _ in found]
    return Answers(
        ids=[item.id for item in items],
        image_ids=[record.image_id for record, _, _ in found],
        categories=[item.category for item in items],
        subsets=np.array([[name in item.subsets for name in SUBSETS] for item in items]),
        truth=np.array([item.candidates.index(item.truth) for item in items]),
        greedy=np.array([reading.greedy for _, _, reading in found]),
        expected=np.array([reading.expected for _, _, reading in found]),
        direct=np.array([reading.direct for _, _, reading in found]),
        direct_log_probs=np.array([reading.direct_log_probs for _, _, reading in found]),
    )
