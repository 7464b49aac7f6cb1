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

from csp_jax.calibration.protocols import QuestionTree, Reading, Shots, question_tree, read_question
from csp_jax.data.batch import Batch, Packer, Sample, Shape, Tree
from csp_jax.data.buckets import Buckets
from csp_jax.data.pictures import check_slots, show
from csp_jax.data.recipes.base import Asker, noise_identity
from csp_jax.data.shards import ShardSource
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.losses.logprobs import score
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.perturb import to_canvas
from csp_jax.records import Item, Record
from csp_jax.sharding import put_batch
from csp_jax.text import Prompts

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
    pixels = None if batch.canvas is None else model.pixels(batch, to_canvas(batch.canvas))
    scores = score(model, batch, pixels, dtype=dtype)
    return scores.log_probs, scores.top_token


class Scorer:
    """A scoring pass of one model; models of one structure and batches of one shape share a compilation."""

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, dtype: jnp.dtype = jnp.float32):
        self.mesh, self.dtype = mesh, jnp.dtype(dtype)
        self._graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, NamedSharding(mesh, P()))

    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of all targets and the model's own tokens there, on the device."""
        return _score(self._graphdef, self._state, put_batch(batch, self.mesh, leading=0), dtype=self.dtype)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The program of a pass, not yet compiled."""
        return _score.lower(self._graphdef, self._state, put_batch(batch, self.mesh, leading=0), dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class SceneTrees:
    """One record's prompt and the trees of its questions."""

    record: Record
    items: tuple[Item, ...]
    questions: tuple[QuestionTree, ...]
    sample: Sample


def shared_prompt(asker: Asker) -> tuple[int, ...]:
    """The tokens that every question about a picture begins with: up to the last picture slot."""
    tokens = asker.family.encode("x", None, asker.slots).tokens
    last = max(number for number, token in enumerate(tokens) if token == asker.family.image_token)
    return tokens[: last + 1]


def example_shots(source: ShardSource, count: int) -> Shots:
    """Examples to put before a confidence query: `count` questions of a split (one that is not evaluated), with a
    right response that is called 100% sure and a wrong one that is called 0% sure in turn.
    """
    shots: list[tuple[str, str, int]] = []
    for record in (source[index] for index in range(len(source))):
        item = next((item for item in record.items if len(item.candidates) > 1), None)
        if item is None:
            continue
        right = len(shots) % 2 == 0
        wrong = next(candidate for candidate in item.candidates if candidate != item.truth)
        shots.append((item.question, item.truth if right else wrong, 100 if right else 0))
        if len(shots) == count:
            return tuple(shots)
    raise UserError(
        "the split has too few questions", file=source.directory, field="shots", value=count, mend="Ask for fewer"
    )


def choice_items(record: Record) -> tuple[Item, ...]:
    """The items that have answers to choose from."""
    return tuple(item for item in record.items if len(item.candidates) > 1)


def scene_trees(
    family: HostFamily, prompts: Prompts, record: Record, items: tuple[Item, ...], shots: Shots = ()
) -> SceneTrees:
    """A record as one sample: its picture in the prompt, one group for each question."""
    picture = show(family, open_image(record.images[0], record.image_id), noise_id=noise_identity(record.id))
    asker = Asker(family, prompts, picture)
    prompt = shared_prompt(asker)
    questions = tuple(question_tree(asker, item, len(prompt), shots) for item in items)
    sample = check_slots(family, Sample(prompt, (picture,), tuple(q.tree for q in questions)))
    return SceneTrees(record, items, questions, sample)


def split_by_regime(family: HostFamily, scene: SceneTrees) -> list[SceneTrees]:
    """A scene as parts whose questions are of one rotary regime (see `HostFamily.regime`); nearly always one part."""
    size = len(scene.sample.prompt)
    regimes = [family.regime(size + depth(question.tree)) for question in scene.questions]
    parts = []
    for regime in dict.fromkeys(regimes):
        chosen = [number for number, own in enumerate(regimes) if own == regime]
        parts.append(
            SceneTrees(
                scene.record,
                tuple(scene.items[number] for number in chosen),
                tuple(scene.questions[number] for number in chosen),
                dataclasses.replace(scene.sample, groups=tuple(scene.sample.groups[number] for number in chosen)),
            )
        )
    return parts


def depth(tree: Tree) -> int:
    """Tokens of a tree's longest path, its target included."""
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max((1 + (depths[parent] if parent >= 0 else 0) for _, parent, _, _ in tree.targets), default=0)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def shape_of(samples: Sequence[Sample], rows: int) -> Shape:
    """A shape that samples of merged trees all fit, one a row."""
    trees = [group for sample in samples for group in sample.groups if isinstance(group, Tree)]
    first = samples[0].pictures[0]
    groups = max(len(sample.groups) for sample in samples)
    return Shape(
        rows=rows,
        prompt=max(len(sample.prompt) for sample in samples),
        groups=groups,
        length=_round_up(max(len(tree.tokens) for tree in trees), 8),
        targets=_round_up(max(len(tree.targets) for tree in trees), 8),
        responses=groups,
        pictures=1,
        canvas=first.cell or (first.canvas.shape[0], first.canvas.shape[1]),
        cells=max(sum(picture.cells for picture in sample.pictures) for sample in samples),
    )


def evaluate(
    model: VisionLanguageModel,
    family: HostFamily,
    prompts: Prompts,
    source: ShardSource,
    mesh: Mesh,
    *,
    limit: int = 0,
    rows: int = 4,
    shots: Shots = (),
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Ask a model every question of a split (of its first `limit` records) once.

    Each host asks about its part of the records on its own devices, which `mesh` spans, `rows` records at a time;
    all hosts return all answers, in the order of the records.
    """
    wanted = min(limit or len(source), len(source))
    hosts, host = jax.process_count(), jax.process_index()
    records = (source[place] for place in range(wanted * host // hosts, wanted * (host + 1) // hosts))
    scenes = [
        part
        for record in records
        for part in split_by_regime(family, scene_trees(family, prompts, record, choice_items(record), shots))
        if part.items
    ]
    # Hosts meet here, before they compile: CPU collectives wait long for a host that they know, not for a first one.
    if not multihost_utils.process_allgather(np.array(len(scenes))).any():
        raise UserError("there is nothing to evaluate", file=source.directory, field="split", value=source.split)
    return gathered(_ask_scenes(Scorer(model, mesh), scenes, rows, progress) if scenes else None)


def _ask_scenes(
    scorer: Scorer, scenes: list[SceneTrees], rows: int, progress: Callable[[int, int], None] | None
) -> Answers:
    """What the scenes' questions are answered with."""
    shape = shape_of([scene.sample for scene in scenes], rows)
    found: list[tuple[Record, Item, Reading]] = []
    for number, (chunk, result) in enumerate(_sweep(scorer, Buckets(shape), scenes)):
        log_probs, top = (np.asarray(x) for x in jax.device_get(result))
        for row, scene in enumerate(chunk):
            for group, (item, question) in enumerate(zip(scene.items, scene.questions, strict=True)):
                at = slice(group * shape.targets, group * shape.targets + len(question.tree.targets))
                found.append((scene.record, item, read_question(question, log_probs[row, at], top[row, at])))
        if progress:
            progress((number + 1) * rows, len(scenes))
    return collect(found)


def gathered(answers: Answers | None) -> Answers:
    """The answers of all hosts, on each; None where a host has none."""
    if answers is not None and jax.process_count() == 1:
        return answers
    own = io.BytesIO()
    if answers is not None:
        answers.write(own)
    sizes = multihost_utils.process_allgather(np.array(own.tell())).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.tell()] = np.frombuffer(own.getvalue(), np.uint8)
    files = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    parts = [Answers.load(io.BytesIO(row[:size].tobytes())) for row, size in zip(files, sizes) if size]
    return Answers.joined(parts)


def ask_records(
    scorer: Scorer, family: HostFamily, prompts: Prompts, records: Sequence[Record], item: Item
) -> list[Reading]:
    """What a model says to one question about each of several pictures, in one batch."""
    scenes = [scene_trees(family, prompts, record, (item,)) for record in records]
    whole = Buckets(shape_of([scene.sample for scene in scenes], len(scenes)))
    ((_, result),) = _sweep(scorer, whole, scenes)
    log_probs, top = (np.asarray(x) for x in jax.device_get(result))
    edges = [len(scene.questions[0].tree.targets) for scene in scenes]
    return [
        read_question(scene.questions[0], log_probs[row, :end], top[row, :end])
        for row, (scene, end) in enumerate(zip(scenes, edges, strict=True))
    ]


def _sweep(
    scorer: Scorer, buckets: Buckets, scenes: list[SceneTrees]
) -> Iterator[tuple[list[SceneTrees], tuple[jax.Array, jax.Array]]]:
    """Score scenes in chunks; the next chunk is on its way before the last one is read."""
    rows = buckets.whole.rows
    waiting: tuple[list[SceneTrees], tuple[jax.Array, jax.Array]] | None = None
    for start in range(0, len(scenes), rows):
        chunk = scenes[start : start + rows]
        packer = Packer(buckets([scene.sample for scene in chunk]))
        for scene in chunk:
            packer.add(scene.sample, share_rows=False)
        result = scorer(packer.batch)
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
        expected=np.array([reading.expected() for _, _, reading in found]),
        direct=np.array([reading.direct for _, _, reading in found]),
        direct_log_probs=np.array([reading.direct_log_probs for _, _, reading in found]),
    )
