"""A world: random access to its records, and the writer of its data sets."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.records import Record, Region, ShardWriter, encode_mask
from csp_jax.world.backgrounds import BackgroundSource, ProceduralBackgrounds
from csp_jax.world.catalogue import ObjectClass, embedded_objects
from csp_jax.world.config import WorldConfig
from csp_jax.world.dense import dense_questions
from csp_jax.world.facts import Facts
from csp_jax.world.folders import PhotoBackgrounds, folder_objects
from csp_jax.world.plan import Plan, Planner, Statistics
from csp_jax.world.questions import (
    Existence,
    Question,
    contact_questions,
    number_questions,
    position_questions,
    size_questions,
)
from csp_jax.world.scene import Layouter, Scene, SpriteMaker

TRAINING = {"base": True, "train": True, "validation": False, "test": False}
PROGRESS_EVERY = 100
FEWEST_CLASSES = 8  # five in a scene, two absent ones to ask about, one to spare


class _Side:
    """What training splits share, or what held-out splits share: classes, cut-outs, statistics, negatives."""

    def __init__(self, config: WorldConfig, classes: tuple[ObjectClass, ...], held_out: bool):
        self.planner = Planner(config, classes, held_out)
        self.layouter = Layouter(config, SpriteMaker(config, classes, held_out))
        self.statistics = Statistics.simulate(self.planner, len(classes), config.statistics_scenes, config.seed)
        self.existence = Existence(config, classes, self.planner.usable, self.statistics)


class World:
    """Rendered scenes with exact masks and questions: the same seed, split and index, the same record."""

    def __init__(self, config: WorldConfig | None = None):
        self.config = config or WorldConfig()
        self.classes: tuple[ObjectClass, ...] = _classes(self.config)
        self.backgrounds: BackgroundSource = _backgrounds(self.config)
        self._sides = {held_out: _Side(self.config, self.classes, held_out) for held_out in (False, True)}

    def _random(self, split: str, index: int, stream: int) -> np.random.Generator:
        if index < 0:
            raise UserError("scenes are numbered from 0", field="index", value=index)
        _is_training(split)
        return np.random.default_rng((self.config.seed, zlib.crc32(split.encode()), index, stream))

    def statistics(self, split: str) -> Statistics:
        """Class frequencies and co-occurrences behind the negatives of a split."""
        return self._sides[not _is_training(split)].statistics

    def plan(self, split: str, index: int) -> Plan:
        """What a scene will hold; costs no rendering."""
        return self._sides[not _is_training(split)].planner.plan(self._random(split, index, 0))

    def scene(self, split: str, index: int) -> Scene:
        """The scene of a record: its plan, background and placed objects."""
        held_out = not _is_training(split)
        rng = self._random(split, index, 0)
        side = self._sides[held_out]
        plan = side.planner.plan(rng)
        objects = side.layouter.lay_out(rng, plan)
        return Scene(plan, self.backgrounds.paint(rng, held_out), objects)

    def record(self, split: str, index: int) -> Record:
        """One scene with its regions (one per object instance) and questions."""
        scene = self.scene(split, index)
        facts = Facts(self.config, self.classes, scene)
        identifier = f"{self.config.name}-{self.config.seed}-{split}-{index:07d}"
        questions = self._questions(self._random(split, index, 1), facts, split)
        return Record(
            id=identifier,
            dataset=self.config.name,
            image_id=identifier,
            images=(_png(scene.render()),),
            regions=tuple(Region(thing.name, _floats(thing.box), encode_mask(thing.mask)) for thing in facts.things),
            items=tuple(q.item(f"{identifier}-q{number:02d}") for number, q in enumerate(questions)),
        )

    def _questions(self, rng: np.random.Generator, facts: Facts, split: str) -> list[Question]:
        training = _is_training(split)
        existence = self._sides[not training].existence
        questions = existence.training(rng, facts) if training else existence.evaluation(rng, facts)
        questions += number_questions(rng, facts)
        questions += size_questions(rng, facts, forms=2 if training else 1)
        questions += contact_questions(rng, facts, self.config)
        for category in ("left_of", "above"):
            questions += position_questions(rng, facts, self.config, category, 2 if training else 1)
        if training:
            questions += dense_questions(rng, facts, self.config)
        return questions


def _is_training(split: str) -> bool:
    if split not in TRAINING:
        raise UserError(
            "no such split of the world", field="split", value=split, mend=f"Use one of {', '.join(TRAINING)}"
        )
    return TRAINING[split]


def _classes(config: WorldConfig) -> tuple[ObjectClass, ...]:
    if config.objects is None:
        return embedded_objects()
    found = folder_objects(
        config.objects,
        sides=(config.small[0], 2 * config.large[1]),
        seed=config.seed,
        classes=config.classes,
        exclude=config.exclude,
    )
    askable = sum(bool(item.held_out) for item in found.classes)
    if askable < FEWEST_CLASSES:
        raise UserError(
            f"only {askable} nouns have two different cut-outs, one of them for held-out scenes; "
            f"a world needs {FEWEST_CLASSES}",
            file=config.objects,
            field="objects",
            mend="Add cut-outs, or name them alike in a class file (classes)",
        )
    return tuple(item for item in found.classes if item.held_out or not config.shared_only)


def _backgrounds(config: WorldConfig) -> BackgroundSource:
    if config.backgrounds is None:
        return ProceduralBackgrounds(config.canvas)
    return PhotoBackgrounds(config.backgrounds, config.canvas, seed=config.seed, exclude=config.exclude)


def _floats(box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return float(x0), float(y0), float(x1), float(y1)


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def build(
    config: WorldConfig,
    out_dir: str | Path,
    splits: Mapping[str, int],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    overwrite: bool = False,
    records_per_shard: int = 1024,
) -> None:
    """Writes a world's splits (name -> number of scenes) as one data set.

    `progress` is called with (split, scenes written, scenes in all). The manifest's metadata holds the config
    and the class statistics. Raises UserError for an unknown split, or one that exists already.
    """
    world = World(config)
    for split, scenes in splits.items():
        _is_training(split)
        if scenes < 1:
            raise UserError("write at least one scene", field=f"splits.{split}", value=scenes)
    for split, scenes in splits.items():
        statistics = world.statistics(split)
        metadata = {
            "world": config.model_dump(mode="json"),
            "statistics": {
                "classes": [item.name for item in world.classes],
                "frequency": [round(float(value), 6) for value in statistics.frequency],
                "together": [[round(float(v), 6) for v in row] for row in statistics.together],
            },
        }
        with ShardWriter(
            out_dir,
            dataset=config.name,
            split=split,
            records_per_shard=records_per_shard,
            metadata=metadata,
            overwrite=overwrite,
        ) as writer:
            for index in range(scenes):
                writer.write(world.record(split, index))
                if progress and ((index + 1) % PROGRESS_EVERY == 0 or index + 1 == scenes):
                    progress(split, index + 1, scenes)
