"""`csp plan`: configurations times targets, each searched in a child process of compilers."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.plan import page
from csp_jax.plan.compilers import Compiler
from csp_jax.plan.search import Candidate, Trial, recommend, search
from csp_jax.plan.targets import Target, parse_target
from csp_jax.train.configured import check_attention
from csp_jax.world import BASE


def model_folder(config: TrainConfig, file: Path) -> Path:
    """The folder with the model's `config.json`: the checkpoint itself or, where it is not there, that of the training
    before (`after`), or the published numbers in `models/NAME` beside the configuration or above it."""
    name = config.model.checkpoint
    above = file.resolve().parents
    folders = [BASE if name == "world" else Path(name), *(parent / "models" / Path(name).name for parent in above)]
    for folder in folders:
        if (folder / "config.json").exists():
            return folder
    if config.after:
        before = next((p for p in (Path(config.after), file.parent / Path(config.after).name) if p.exists()), None)
        if before is not None:
            return model_folder(load_config(TrainConfig, before), before)
    raise UserError(
        "neither the checkpoint nor its numbers are here",
        file=file,
        field="model.checkpoint",
        value=name,
        mend=f"Put its config.json into {folders[1]}",
    )


Known = tuple[Path, str, int]  # a model's folder, a card and how many of them a host has


@dataclasses.dataclass(frozen=True)
class Plan:
    """One configuration on one target."""

    file: Path
    config: TrainConfig
    target: Target
    trials: list[Trial]

    @property
    def name(self) -> str:
        """Folder and file, for `llava-7b-sft` is more than one thing."""
        return f"{self.file.resolve().parent.name}/{self.file.stem}"

    def rows(self) -> list[dict[str, Any]]:
        return page.rows(self.name, self.target, self.trials)

    def page(self) -> str:
        return page.page(self.name, self.config, self.target, self.trials)

    @property
    def fits(self) -> bool:
        """Whether anything that was tried does."""
        return recommend(self.trials) is not None


def make_plans(
    files: Sequence[Path],
    targets: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    packages: Path | None = None,
    only: bool = False,
    before: Sequence[dict[str, Any]] = (),
    done: Callable[[Plan], None] = lambda plan: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Plan]:
    """Every configuration on every target; what was best for a model on a card is tried in its next search.

    `only`: the configurations as they are, nothing else is tried. `before`: rows of earlier plans, whose best counts,
    too. `done` is told of every plan as it is made.
    """
    jobs = [(file, load_config(TrainConfig, file, list(overrides))) for file in files]
    for target in map(parse_target, targets):
        for file, config in jobs:
            check_compiles(config, file, target)
    folders = {file: model_folder(config, file) for file, config in jobs}
    plans: list[Plan] = []
    known = best_of(before, files[0].resolve().parents[1]) if before else {}
    for target in map(parse_target, targets):
        with Compiler(target, packages) as compiler:
            for file, config in jobs:
                key = (folders[file], target.card.name, target.per_host)
                found = search(
                    config,
                    folders[file],
                    target,
                    compiler.measure,
                    known=_scaled(known.get(key), config, target),
                    only=only,
                    say=functools.partial(say_of, file.stem, say),
                )
                plans.append(Plan(file, config, target, found))
                best = recommend(found)
                if best:
                    known[key] = best.candidate
                done(plans[-1])
    return plans


def check_compiles(config: TrainConfig, file: Path, target: Target) -> None:
    """UserError where the attention is not for the target, or cannot be compiled away from it."""
    check_attention(config, target.card.platform)
    if config.model.attention == "cudnn":
        raise UserError(
            "cuDNN's attention is compiled on the card alone",
            file=file,
            field="model.attention",
            value="cudnn",
            mend="Plan with model.attention=pallas, whose memory is much the same",
        )


def best_of(rows: Sequence[dict[str, Any]], configs: Path) -> dict[Known, Candidate]:
    """Of each model on each card, the recommended candidate with the highest estimate; `configs` is the folder above
    the configurations that the rows name."""
    known: dict[Known, Candidate] = {}
    for row in sorted(rows, key=lambda row: row["estimated_mfu"] or 0.0):
        file = configs / f"{row['config']}.yaml"
        if row["recommended"] and file.exists():
            target = parse_target(row["target"])
            key = (model_folder(load_config(TrainConfig, file), file), target.card.name, target.per_host)
            known[key] = Candidate(**row["mesh"], **row["batch"], remat=row["remat"], attention=row["attention"])
    return known


def say_of(name: str, say: Callable[[str], None], text: str) -> None:
    """Pass on what a search says, under its configuration's name."""
    say(f"{name} on {text}")


def _scaled(known: Candidate | None, config: TrainConfig, target: Target) -> Candidate | None:
    """What was best on fewer or more hosts, with as many rows a device."""
    if known is None or target.devices % (known.fsdp * known.tensor):
        return None
    data = target.devices // (known.fsdp * known.tensor)
    grown = dataclasses.replace(known, data=data)
    rows = max(int(known.rows_a_device * grown.split), grown.split)
    return grown.with_rows(rows, config.batch.rows * config.batch.accumulation)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that `save_rows` wrote; none where there is no file."""
    return json.loads(file.read_text()) if file.exists() else []


def save_rows(file: Path, plans: Sequence[Plan]) -> None:
    """The rows of all plans as JSON, by card, devices and configuration; rows of others that the file holds stay."""
    rows = read_rows(file)
    made = {(plan.name, str(plan.target)) for plan in plans}
    rows = [row for row in rows if (row["config"], row["target"]) not in made]
    rows += [row for plan in plans for row in plan.rows()]
    rows.sort(key=lambda row: (row["target"].partition(":")[0], row["devices"], row["config"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    temporary.rename(file)


def write_config(folder: Path, plan: Plan) -> Path | None:
    """The recommendation as a configuration that extends the one that was planned."""
    best = recommend(plan.trials)
    if best is None:
        return None
    candidate = best.candidate
    before = plan.config.batch.rows * plan.config.batch.accumulation
    lines = [
        f"# {plan.file.name} as `csp plan` recommends it for {plan.target}: estimated MFU {best.mfu:.0%}, "
        f"{(best.peak or 0) / page.GIB:.0f} GiB of {best.available / page.GIB:.0f} a device.",
        f"# An update is made of {candidate.update} rows"
        + ("." if candidate.update == before else f" ({before} there): learning rate and warm-up are to be tuned."),
    ]
    name = f"{plan.file.stem}-{str(plan.target).replace(':', '-')}.yaml"
    attention = {} if candidate.attention == plan.config.model.attention else {"attention": candidate.attention}
    values = {
        "extends": os.path.relpath(plan.file, folder),
        "model": {"remat": candidate.remat, **attention},
        "batch": {"rows": candidate.rows, "accumulation": candidate.accumulation},
        "parallel": candidate.mesh,
        "run": {"out": f"runs/{Path(name).stem}"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
    return file
