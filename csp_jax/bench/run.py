"""`csp bench`: from configurations to tasks, and from their turns to rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from csp_jax.bench.clock import Neighbours, Products, Seconds, Timed, in_turns, paired_ratio, peak_memory
from csp_jax.bench.made import Lengths, made_ground, write_shards
from csp_jax.bench.tasks import Evaluation, Scores, Task, Updates, packed, prefill_and_distribution
from csp_jax.bench.work import Work, micro_batches
from csp_jax.config import ShapeConfig, TrainConfig, load_config
from csp_jax.data.batch import merge_branches
from csp_jax.data.recipes import RECIPES
from csp_jax.data.shards import ShardSource
from csp_jax.errors import UserError
from csp_jax.evaluate import Scorer
from csp_jax.families.registry import open_family
from csp_jax.models.hub import weight_files
from csp_jax.models.lora import merge_adapter
from csp_jax.models.native import is_native
from csp_jax.plan.run import model_folder
from csp_jax.policy import batches_for
from csp_jax.records import read_manifest
from csp_jax.text import Prompts
from csp_jax.train.loop import Run

TRAINED = ("sft", "simpo", "grpo")
SCORED = ("base", "eval", "verbal", "prefill")
TASKS = (*TRAINED, *SCORED)
ORDER = ("base", *TRAINED, "eval", "verbal", "prefill", "distribution")  # of the turns


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of made trainings: rows of a micro-batch, micro-batches of an update, samples of a policy and their tokens."""

    rows: int = 8
    accumulation: int = 2
    samples: int = 8
    tokens: int = 8
    lengths: Lengths = dataclasses.field(default_factory=Lengths)


# --- configurations --------------------------------------------------------------------------------------------------


def made_config(
    task: str, folder: Path, shards: Path, settings: Settings, overrides: Sequence[str] = ()
) -> TrainConfig:
    """A training on made records, whose shape fits them: no padding."""
    policy = task == "grpo"
    recipe: dict[str, Any] = {"name": "questions" if policy else "original", "items": 1}
    record = ShardSource(shards, "train")[0]
    values: dict[str, Any] = {
        "model": {"checkpoint": str(folder)},
        "data": {"shards": str(shards), "recipe": recipe | {"shape": _shape(task, folder, record, recipe)}},
        "loss": {"name": task},
        "rollout": {"samples": settings.samples, "max_tokens": settings.tokens, "rounds": 1},
        "batch": {"rows": settings.rows, "accumulation": settings.accumulation},
        "optimizer": {"schedule": "constant"},
        "run": {"out": str(shards.parent / "out"), "steps": 1000, "progress": False},
    }
    file = shards.parent / f"{task}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(TrainConfig, file, list(overrides))


def _shape(task: str, folder: Path, record: Any, recipe: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of what the recipe draws from a record."""
    roomy = ShapeConfig(prompt=1 << 20, groups=16, length=1 << 20, targets=1 << 20, responses=1 << 20)
    values = TrainConfig.model_validate({"loss": {"name": task}, "data": {"recipe": {**recipe, "shape": roomy}}})
    objective = "simpo" if task == "simpo" else "sft"
    draw = RECIPES[recipe["name"]](values.data.recipe, str(folder), Prompts(), objective)  # type: ignore[arg-type]
    sample = draw(record, np.random.default_rng(0)).sample
    assert sample is not None, "made records suit every recipe that is used here"
    trees = [merge_branches(group) for group in sample.groups if isinstance(group, tuple)]
    return {
        "prompt": len(sample.prompt),
        "groups": max(len(trees), 1),
        "length": max((len(tree.tokens) for tree in trees), default=1),
        "targets": max((len(tree.targets) for tree in trees), default=1),
        "responses": max(sum(len(group) for group in sample.groups if isinstance(group, tuple)), 1),
        "cells": sum(picture.cells for picture in sample.pictures),
    }


def given_config(file: Path, made: Path, settings: Settings, overrides: Sequence[str]) -> TrainConfig:
    """A configuration as it is; where its weights or its shards are not here, random ones and made ones."""
    config = load_config(TrainConfig, file, list(overrides))
    folder = model_folder(config, file)
    model, data = {"checkpoint": str(folder)}, {}
    if not is_native(folder) and not _has_weights(folder):
        model["random_init"] = True  # type: ignore[assignment]
    if not (Path(config.data.shards) / "manifest.json").exists():
        short = dataclasses.replace(settings.lengths, prompt=0)  # for the configured shape is to hold it
        data = {"shards": str(write_shards(made / file.stem, open_family(folder), short)), "split": "train"}
    parts = {"model": config.model.model_copy(update=model), "data": config.data.model_copy(update=data)}
    return config.model_copy(update=parts)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


# --- tasks -----------------------------------------------------------------------------------------------------------


def make_tasks(config: TrainConfig, names: Sequence[str], prefix: str = "") -> list[Task]:
    """The tasks of a configuration: its own loss if that is among `names`, and what scores with its model.

    UserError: none of `names` is a task of it.
    """
    tasks: list[Task] = []
    wanted = [name for name in names if name in SCORED or name == config.loss.name]
    if not wanted:
        mend = f"Use {', '.join((config.loss.name, *SCORED))}"
        raise UserError("nothing to time: the configuration has another loss", field="--task", value=names, mend=mend)
    run = Run(config)
    windows = batches_for(config)(run)
    if config.loss.name in wanted:
        tasks.append(Updates(f"{prefix}{config.loss.name}", run, windows))
    if set(wanted) & set(SCORED):
        tasks += scoring_tasks(run, wanted, prefix)
    return tasks


def scoring_tasks(run: Run, names: Sequence[str], prefix: str) -> list[Task]:
    """What scores with a run's model: a copy, for a step gives its parameters up."""
    config, family = run.config, open_family(run.source_folder)
    model = merge_adapter(jax.tree.map(jnp.copy, run.model()))
    scorer = Scorer(model, run.mesh, jnp.dtype(config.model.dtype))
    tasks: list[Task] = []
    if "base" in names:
        window = next(iter(run.dataset()))
        tasks.append(Scores(f"{prefix}base", scorer, model, micro_batches(window.batch)))
    if "eval" in names:
        tasks.append(Evaluation(f"{prefix}eval", model, family, evaluated(run), run, "exact"))
    if "verbal" in names:
        tasks.append(Evaluation(f"{prefix}verbal", model, family, evaluated(run), run, "verbal"))
    if "prefill" in names:
        count = min(run.rows, len(run.source))
        for name, samples in zip(("prefill", "distribution"), prefill_and_distribution(family, run.source, count)):
            tasks.append(Scores(f"{prefix}{name}", scorer, model, packed(samples, count)))
    return tasks


def evaluated(run: Run) -> ShardSource:
    """The split `test` of a run's data where there is one."""
    data = run.config.data
    return ShardSource(data.shards, "test") if "test" in read_manifest(data.shards).splits else run.source


def made_tasks(
    model: str, names: Sequence[str], settings: Settings, folder: Path, overrides: Sequence[str] = ()
) -> list[Task]:
    """The tasks of a model by name or folder on made records. What scores goes with the first training."""
    checkpoint, shards = made_ground(model, settings.lengths, folder)
    tasks: list[Task] = []
    trained = [name for name in TRAINED if name in names]
    scored = [name for name in SCORED if name in names]
    for loss in trained or ["sft"]:
        config = made_config(loss, checkpoint, shards, settings, overrides)
        with_it = scored if loss == "sft" or (not tasks and "sft" not in trained) else []
        tasks += make_tasks(config, [*(name for name in trained if name == loss), *with_it])
    return sorted(tasks, key=lambda task: ORDER.index(task.name))


# --- rows ------------------------------------------------------------------------------------------------------------


def measure(
    tasks: Sequence[Task],
    *,
    repeats: int,
    warmup: int = 2,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for every part of every task, after `warmup` turns that do not count.

    The roofline takes its turn like everybody, so that a part's MFU comes from pairs, as ratios do.
    """
    products = Products(jnp.dtype(dtype))
    everyone: list[Timed] = [*tasks, products]
    in_turns(everyone, warmup, lambda turn: say(f"warm-up {turn + 1} of {warmup}"))
    neighbours = Neighbours()
    seconds = in_turns(everyone, repeats, lambda turn: say(f"turn {turn + 1} of {repeats}"))
    busy = neighbours.cores()
    peak, where = peak_memory()
    about = {
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_busy_elsewhere": busy,
        "peak_bytes": peak,
        "peak_of": where,
        "jax": version("jax"),
        "turns": repeats,
    }
    works = {part: work for task in tasks for part, work in task.work().items()}
    works[products.name] = Work(flops=products.flops)
    rows = [row_of(part, work, seconds, products) for part, work in works.items()]
    return [{**row, **about} for row in rows]


def reference_of(part: str, parts: Sequence[str]) -> str:
    """What a part's time is compared with: the distribution with its prefill, all else with SFT or what comes first."""
    if part.endswith("distribution"):
        return part.removesuffix("distribution") + "prefill"
    return next((name for name in parts if name.endswith("sft")), parts[0])


def row_of(part: str, work: Work, seconds: Seconds, products: Products) -> dict[str, Any]:
    """Of one part: median and best time, rates by the median, MFU and ratio by pairs within a turn.

    Peak FLOPs are those of the roofline on every device.
    """
    took, reference = seconds[part], reference_of(part, list(seconds))
    median, mfu = float(np.median(took)), None
    if work.flops is not None and part != products.name:
        rate = products.flops / seconds[products.name]
        mfu = float(np.median(work.flops / took / (rate * jax.device_count())))
    return {
        "task": part,
        "seconds": median,
        "best_seconds": float(took.min()),
        "steps_per_second": 1 / median,
        "images_per_second": work.images / median,
        "samples_per_second": work.samples / median,
        "tokens_per_second": work.tokens / median,
        "sequence_tokens_per_second": work.sequence_tokens / median,
        "images": work.images,
        "samples": work.samples,
        "tokens": work.tokens,
        "sequence_tokens": work.sequence_tokens,
        "filled": work.tokens / work.slots if work.slots else None,
        "flops": work.flops,
        "flops_per_second": work.flops / median if work.flops is not None else None,
        "mfu": mfu,
        "ratio": paired_ratio(took, seconds[reference]),
        "ratio_to": reference,
        "program_bytes": work.program_bytes,
        "all_seconds": took.tolist(),
    }
