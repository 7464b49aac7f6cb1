"""`csp demo`: from an empty folder to the page that shows what calibration did, one stage after the other.

    world -> train (two recipes, two stages each) -> ask every model -> scores -> report

Everything that a stage makes lies in the run folder; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from csp_jax.calibration.recalibrate import fit_platt
from csp_jax.config import DemoConfig, ParallelConfig, TrainConfig, load_config, read_config
from csp_jax.data.shards import ShardSource
from csp_jax.errors import UserError
from csp_jax.evaluate import Answers, Scorer, ask_records, evaluate
from csp_jax.families.interface import open_image
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model
from csp_jax.perturb import Schedule, bury, to_canvas
from csp_jax.records import Item, Record, decode_mask
from csp_jax.report import build_report
from csp_jax.results import READINGS, Row, report_conventions, result_rows, write_rows
from csp_jax.scenes import SceneTrees, open_scenes
from csp_jax.sharding import make_mesh
from csp_jax.text import Prompts
from csp_jax.train.loop import checkpoint_folder, train
from csp_jax.world import WorldConfig, build

Say = Callable[[str], None]
STRIP_LEVELS = (100, 80, 60, 40, 20, 0)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training: its configuration file, the folder it is trained in (variants may share one), what is changed."""

    file: str
    folder: str
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model of the results and the stages that lead to it from the base."""

    model: str
    recipe: str
    stages: tuple[Stage, ...]


def variants(recipes: tuple[str, ...], ablations: bool) -> list[Variant]:
    """The models beside the base: both stages of each recipe, and with `ablations` those of [A] 4.3.2 and ours."""
    changes = {
        "global": ("data.recipe.region=global",),
        "original": ("data.recipe.name=original",),
        "unperturbed": ("noise.name=none",),
    }
    found = []
    for recipe in recipes:
        sft = Stage(f"{recipe}-sft", f"{recipe}-sft")
        simpo = Stage(f"{recipe}-simpo", f"{recipe}-simpo")
        found += [Variant("sft", recipe, (sft,)), Variant("sft+simpo", recipe, (sft, simpo))]
        if ablations:
            found.append(Variant("simpo", recipe, (Stage(simpo.file, f"{recipe}-simpo_only"),)))
            for name, over in changes.items():
                both = (
                    Stage(sft.file, f"{recipe}-{name}_sft", over),
                    Stage(simpo.file, f"{recipe}-{name}_simpo", over),
                )
                found.append(Variant(name, recipe, both))
    return found


def stage_file(name: str) -> Path:
    """A stage's file in configs/world, of the checkout or of the installed package."""
    here = Path(__file__).parent
    for folder in (here.parent / "configs", here / "configs"):
        if (folder / "world" / f"{name}.yaml").exists():
            return folder / "world" / f"{name}.yaml"
    raise UserError("the stage's configuration is missing", file=f"configs/world/{name}.yaml", mend="Install again")


class Clock:
    """Wall-clock seconds of named stages, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Demo:
    """One run of the demo in a folder."""

    def __init__(self, config: DemoConfig, out: Path, *, ablations: bool, say: Say):
        self.config, self.out, self.ablations, self.say = config, out, ablations, say
        self.clock = Clock()
        self.mesh = make_mesh(ParallelConfig(data=1), jax.local_devices()[:1])
        self.prompts = Prompts()
        self.models: dict[tuple[str, str, int], Path] = {}
        self._scenes: dict[str, list[SceneTrees]] = {}
        self.base = checkpoint_folder(config.base)
        self.world_config = load_config(WorldConfig, Path(config.world) if config.world else None, [])

    @property
    def world(self) -> Path:
        return self.out / "world"

    def make_world(self) -> None:
        """Render the scenes of the demo, unless they are there."""
        with self.clock.stage("world"):
            splits = self.config.splits.model_dump()
            wanted = {"splits": splits, "world": self.world_config.model_dump(mode="json")}
            marker = self.world / "demo.json"
            if marker.exists() and json.loads(marker.read_text()) == wanted:
                return
            self.say(f"world: {sum(splits.values())} scenes")
            build(self.world_config, self.world, splits, overwrite=True)
            marker.write_text(json.dumps(wanted))

    def stage_config(self, stage: Stage, checkpoint: str, seed: int) -> TrainConfig:
        """A stage's configuration file with the demo's folders put in."""
        return load_config(
            TrainConfig,
            stage_file(stage.file),
            [
                f"data.shards={self.world}",
                f"run.out={self.out / 'train' / f'{stage.folder}-seed{seed}'}",
                f"model.checkpoint={checkpoint}",
                f"seed={seed}",
                *stage.changes,
                *self.config.overrides,
            ],
        )

    def train_all(self) -> None:
        """Train every variant for every seed; stages that variants share run once."""
        for seed in self.config.seeds:
            for variant in variants(self.config.recipes, self.ablations):
                checkpoint = str(self.base)
                for stage in variant.stages:
                    with self.clock.stage(f"train {stage.folder}"):
                        checkpoint = str(train(self.stage_config(stage, checkpoint, seed), title=stage.folder))
                self.models[variant.model, variant.recipe, seed] = Path(checkpoint)

    def ask(self, name: str, folder: Path, split: str) -> Answers:
        """What a model says to every question of a split."""
        file = self.out / ("predictions" if split == "test" else f"predictions-{split}") / f"{name}.npz"
        if not file.exists():
            self.say(f"asking {name} ({split})")
            evaluate(Scorer(load_model(folder), self.mesh), self.scenes(split), rows=self.config.rows).save(file)
        return Answers.load(file)

    def scenes(self, split: str) -> list[SceneTrees]:
        """The questions of a split; every model is asked the same, and all have the base's words."""
        if split not in self._scenes:
            self._scenes[split] = open_scenes(open_family(self.base), self.prompts, ShardSource(self.world, split))
        return self._scenes[split]

    def score_all(self) -> list[Row]:
        """Rows of all models on the test split; the base first."""
        with self.clock.stage("ask base"):
            base = self.ask("base-", self.base, "test")
        settings: dict[str, Any] = {"reading": self.config.reading, "resamples": self.config.resamples}
        rows: list[Row] = []
        with self.clock.stage("scores"):
            rows += result_rows([base], None, model="base", recipe="", **settings)
        for variant in variants(self.config.recipes, self.ablations):
            key = (variant.model, variant.recipe)
            with self.clock.stage(f"ask {variant.recipe}-{variant.model}"):
                runs = [
                    self.ask(f"{key[0]}-{key[1]}-seed{seed}", self.models[*key, seed], "test")
                    for seed in self.config.seeds
                ]
            with self.clock.stage("scores"):
                rows += result_rows(runs, base, model=key[0], recipe=key[1], **settings)
        if self.ablations:
            with self.clock.stage("ask base"):
                rows += self.platt_rows(base, settings)
        write_rows(self.out / "results.json", rows)
        return rows

    def platt_rows(self, base: Answers, settings: dict[str, Any]) -> list[Row]:
        """The base with Platt scaling fitted on the validation split: what mending the numbers alone can do."""
        held_out = self.ask("base-", self.base, "validation")
        said = held_out.expected.reshape(-1)
        right = (np.arange(2) == held_out.truth[:, None]).reshape(-1)
        platt = fit_platt(said, right)
        mended = dataclasses.replace(
            base,
            expected=np.asarray(platt(base.expected), np.float64),
            greedy=np.asarray(platt(base.greedy), np.float64),
        )
        mended.save(self.out / "predictions" / "base+platt-.npz")
        return result_rows([mended], base, model="base+platt", recipe="", **settings)

    def strip(self) -> None:
        """One picture under noise from 100% to 0%, and what each model says under each."""
        with self.clock.stage("strip"):
            record, item = strip_question(ShardSource(self.world, "test"))
            models = {"base": self.base}
            for recipe in self.config.recipes:
                models[f"sft+simpo ({recipe})"] = self.models["sft+simpo", recipe, self.config.seeds[0]]
            levels = [noised(record, item, level) for level in STRIP_LEVELS]
            pictures = [shown for shown, _ in levels]
            says = {
                name: ask_records(
                    Scorer(load_model(folder), self.mesh), open_family(folder), self.prompts, pictures, item
                )
                for name, folder in models.items()
            }
            (self.out / "strip").mkdir(exist_ok=True)
            entries = []
            for number, (level, (_, picture)) in enumerate(zip(STRIP_LEVELS, levels)):
                file = f"strip/{level}.png"
                picture.save(self.out / file)
                spoken = {name: readings[number].expected for name, readings in says.items()}
                words = {name: {"yes": float(c[0]), "no": float(c[1])} for name, c in spoken.items()}
                entries.append({"confidence": level, "image": file, "says": words})
            strip = {"question": item.question, "truth": item.truth, "levels": entries}
            (self.out / "strip.json").write_text(json.dumps(strip, indent=1))

    def describe(self) -> None:
        """run.json: what was run, with what, and how long each stage took."""
        packages = ("csp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
        stages = {
            file: read_config(stage_file(file))
            for file in sorted({stage.file for v in variants(self.config.recipes, False) for stage in v.stages})
        }
        run = {
            "name": self.out.name,
            "configuration": {"demo": self.config.model_dump(mode="json"), "stages": stages},
            "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
            "seeds": list(self.config.seeds),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in self.clock.seconds.items()],
            "machine": f"{platform.machine()}, {jax.local_device_count()} {jax.default_backend()} device(s)",
            "notes": [
                "The base's overconfidence is taught, at levels fixed in configs/world/base.yaml; it is not found.",
                f"Confidence is read as: {READINGS[self.config.reading]}.",
            ],
            "conventions": report_conventions(self.config.resamples),
        }
        (self.out / "run.json").write_text(json.dumps(run, indent=1))

    def run(self) -> Path:
        """All stages; returns the report's page."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.make_world()
        self.train_all()
        self.score_all()
        self.strip()
        self.describe()
        with self.clock.stage("report"):
            return build_report(self.out)


def strip_question(source: ShardSource) -> tuple[Record, Item]:
    """The first question of a split about one present object that stands alone, clear and large."""
    for index in range(len(source)):
        record = source[index]
        for item in record.items:
            if item.category != "existence" or item.truth != "yes" or len(item.regions) != 1:
                continue
            x0, _, x1, _ = record.regions[item.regions[0]].box
            if x1 - x0 >= 24:
                return record, item
    return source[0], next(item for item in source[0].items if item.candidates)


def noised(record: Record, item: Item, confidence: int) -> tuple[Record, Image.Image]:
    """The record with the item's objects buried to a confidence, as a new picture."""
    image = open_image(record.images[0], record.image_id)
    mask = np.zeros((image.height, image.width), bool)
    for index in item.regions:
        mask |= decode_mask(record.regions[index].mask, image.height, image.width)
    alpha_bar = Schedule("linear").alpha_bar(jnp.float32(confidence))
    canvas = bury(to_canvas(jnp.asarray(np.asarray(image))), jnp.asarray(mask), alpha_bar, jax.random.key(0))
    picture = Image.fromarray(np.asarray(jnp.round((canvas + 1) * 127.5)).astype(np.uint8))
    return dataclasses.replace(record, images=(png_bytes(picture),)), picture


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
