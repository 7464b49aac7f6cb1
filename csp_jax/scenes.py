"""What an evaluation asks: pictures, each with the trees of its questions, as samples that one shape fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from csp_jax.calibration.protocols import AskItem, Question, Shots, question_trees
from csp_jax.data.batch import Sample, Shape, Tree
from csp_jax.data.pictures import check_slots, show
from csp_jax.data.recipes.base import Asker, noise_identity
from csp_jax.data.shards import ShardSource
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.records import Item, Record
from csp_jax.text import Prompts


@dataclasses.dataclass(frozen=True)
class SceneTrees:
    """One record's prompt and the trees of its questions."""

    record: Record
    items: tuple[Item, ...]
    questions: tuple[Question, ...]
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
    family: HostFamily,
    prompts: Prompts,
    record: Record,
    items: tuple[Item, ...],
    shots: Shots = (),
    ask: AskItem = question_trees,
) -> SceneTrees:
    """A record as one sample: its picture in the prompt, a group for each tree of its questions."""
    picture = show(family, open_image(record.images[0], record.image_id), noise_id=noise_identity(record.id))
    asker = Asker(family, prompts, picture)
    prompt = shared_prompt(asker)
    questions = tuple(ask(asker, item, len(prompt), shots) for item in items)
    sample = check_slots(family, Sample(prompt, (picture,), all_trees(questions)))
    return SceneTrees(record, items, questions, sample)


def all_trees(questions: Sequence[Question]) -> tuple[Tree, ...]:
    """The trees of questions, in order: the groups of the sample that asks them."""
    return tuple(tree for question in questions for tree in question.trees)


def split_scene(scene: SceneTrees, keys: Sequence[float]) -> list[SceneTrees]:
    """A scene as parts, its questions apart where their keys differ."""
    parts = []
    for key in dict.fromkeys(keys):
        chosen = [number for number, own in enumerate(keys) if own == key]
        questions = tuple(scene.questions[number] for number in chosen)
        sample = dataclasses.replace(scene.sample, groups=all_trees(questions))
        parts.append(SceneTrees(scene.record, tuple(scene.items[number] for number in chosen), questions, sample))
    return parts


def split_by_regime(family: HostFamily, scene: SceneTrees) -> list[SceneTrees]:
    """A scene as parts whose questions are of one rotary regime (see `HostFamily.regime`); nearly always one part."""
    size = len(scene.sample.prompt)
    sizes = [size + max(map(depth, question.trees)) + question.tail for question in scene.questions]
    return split_scene(scene, [family.regime(size) for size in sizes])


def rows_of(scene: SceneTrees, trees: int) -> list[int]:
    """The row of each question, if a row holds at most so many trees, or those of one question."""
    rows, filled = [0], len(scene.questions[0].trees)
    for question in scene.questions[1:]:
        starts = filled + len(question.trees) > trees
        rows.append(rows[-1] + starts)
        filled = len(question.trees) + (0 if starts else filled)
    return rows


def trees_a_row(scenes: Sequence[SceneTrees]) -> int:
    """The number of trees a row that scores scenes with the fewest tokens, padding and repeated prompts counted.

    A picture's tokens count three times: once in the decoder, and what the vision tower does for them.
    """
    shape = shape_of([scene.sample for scene in scenes], 1)
    fewest = max(len(question.trees) for scene in scenes for question in scene.questions)

    def tokens(trees: int) -> int:
        rows = sum(rows_of(scene, trees)[-1] + 1 for scene in scenes)
        return rows * (3 * shape.prompt + trees * shape.length)

    return min(range(fewest, shape.groups + 1), key=tokens)


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
    choices = [len(tokens) for tree in trees for tokens in tree.choices]
    first = samples[0].pictures[0]
    groups = max(len(sample.groups) for sample in samples)
    return Shape(
        rows=rows,
        prompt=max(len(sample.prompt) for sample in samples),
        groups=groups,
        length=_round_up(max(len(tree.tokens) for tree in trees), 8),
        targets=max(len(tree.targets) for tree in trees),
        responses=groups,
        pictures=1,
        canvas=first.cell or (first.canvas.shape[0], first.canvas.shape[1]),
        cells=max(sum(picture.cells for picture in sample.pictures) for sample in samples),
        choices=max(choices, default=0),
    )


def open_scenes(
    family: HostFamily,
    prompts: Prompts,
    source: ShardSource,
    *,
    limit: int = 0,
    shots: Shots = (),
    ask: AskItem = question_trees,
) -> list[SceneTrees]:
    """The questions of a split (of its first `limit` records) that this host asks: each record is one host's."""
    wanted = min(limit or len(source), len(source))
    hosts, host = jax.process_count(), jax.process_index()
    records = (source[place] for place in range(wanted * host // hosts, wanted * (host + 1) // hosts))
    whole = [
        part
        for record in records
        if (items := choice_items(record))
        for part in split_by_regime(family, scene_trees(family, prompts, record, items, shots, ask))
    ]
    size = trees_a_row(whole) if whole else 0
    return [part for scene in whole for part in split_scene(scene, rows_of(scene, size))]
