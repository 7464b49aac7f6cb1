"""Typed configuration of every command: YAML, `key=value` overrides, errors that name what to mend."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml

from csp_jax.errors import UserError

Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
AtLeastOne = Annotated[int, pydantic.Field(ge=1)]


class Section(pydantic.BaseModel):
    """A part of a configuration: unknown fields are errors, values do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    """An adapter that trains in the model's place; see `models.lora`."""

    rank: AtLeastOne = 8
    alpha: Positive = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0  # of the adapter's input
    targets: tuple[str, ...] = (r"decoder\.(layers|last)\.",)  # regular expressions on paths of linear layers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the adapter's parameters
    adapter: str = ""  # a folder in PEFT's layout to go on from; rank, alpha and targets are then the folder's


class ModelConfig(Section):
    """Where the weights come from, and how they are held."""

    checkpoint: str = "world"  # a folder in the hub's layout, or `world`: the base that ships with the package
    random_init: bool = False  # take config and tokenizer from the folder, but new random weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    freeze: tuple[str, ...] = ()  # regular expressions on parameter paths
    # Activations of a layer that are kept for its gradient: all, none, products, products with weights only, or what
    # attention reads and gives.
    remat: Literal["none", "full", "dots", "weights", "save_names"] = "none"
    # pallas: our kernel, for NVIDIA GPUs from the A100 on; cudnn: its library's, a prompt a row; splash: for TPUs.
    attention: Literal["xla", "pallas", "cudnn", "splash"] = "xla"
    head_chunk: AtLeastOne = 1024  # scored tokens of a device whose logits exist at a time, about
    lora: LoraConfig | None = None  # train an adapter and nothing else

    @pydantic.model_validator(mode="after")
    def _has_a_base(self) -> ModelConfig:
        if self.lora is not None and self.random_init:
            raise ValueError("an adapter needs a base that can be found again: random_init and lora exclude each other")
        return self


class ShapeConfig(Section):
    """Static sizes of a row; see `data.batch.Shape`."""

    prompt: AtLeastOne = 72
    groups: AtLeastOne = 8
    length: AtLeastOne = 48
    targets: AtLeastOne = 16
    responses: AtLeastOne = 32
    samples: AtLeastOne = 1  # of a row; all other sizes are then those of what they hold together
    cells: Count = 0  # tiles, crops or patches of all pictures; 0: one a picture


class RecipeConfig(Section):
    """What a record becomes; see `data.recipes`."""

    name: Literal["answers", "paper", "evidence", "materialized", "original", "questions"] = "evidence"
    items: AtLeastOne = 4  # items asked about a picture
    free_form: bool = False  # `paper` and `evidence`: also answers without candidates, such as those of RLAIF-V
    categories: tuple[str, ...] = ()  # ordinary questions of these categories only; empty: all
    retention_items: Count = 0  # ordinary questions beside them
    labels: Literal["uniform", "grid"] = "uniform"
    grid: Literal[1, 2, 5, 10, 20, 25] = 10
    region: Literal["mask", "box", "square", "global"] = "mask"  # square: a box has its object's proportions
    clean: Fraction = 0.3
    distractor: Fraction = 0.5
    elsewhere: Fraction = 0.25
    name_slots: bool = False  # name the object on every picture slot, for loss.grounding
    slot_facts: tuple[str, ...] = ()  # free-form categories whose answers name the slots of their objects, too
    early_answers: bool = False  # answer yes/no items also right behind the last deciding word
    verify_items: Count = 0  # yes/no questions whether a random candidate is right (`answers`)
    confidence_items: Count = 0
    confidence_levels: dict[int, Positive] = {}
    ask: Literal["answer", "confidence"] = "answer"  # what a question without an answer asks for (`questions`)
    shape: ShapeConfig = ShapeConfig()

    @pydantic.field_validator("confidence_levels")
    @classmethod
    def _percents(cls, levels: dict[int, float]) -> dict[int, float]:
        for percent in levels:
            if not 0 <= percent <= 100:
                raise ValueError(f"{percent} is not a percentage")
        return levels


class DataConfig(Section):
    """Which shards, and how they are read."""

    shards: str = "world"
    split: str = "train"
    workers: Count = 0
    recipe: RecipeConfig = RecipeConfig()


class NoiseConfig(Section):
    """See `perturb.Schedule`."""

    name: Literal["constant", "linear", "ddpm", "cosine", "none"] = "constant"
    t_max: AtLeastOne = 500
    noise_gamma: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.01
    floor: Fraction = 0.0066


class LossConfig(Section):
    """See `losses.sft`, `losses.simpo` and `losses.grpo`."""

    name: Literal["sft", "simpo", "grpo", "grounding"] = "sft"
    beta: Positive = 2.0
    simpo_gamma: Annotated[float, pydantic.Field(ge=0)] = 1.0
    nll_weight: Annotated[float, pydantic.Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.0
    retention: Annotated[float, pydantic.Field(ge=0)] = 1.0
    grounding: Annotated[float, pydantic.Field(ge=0)] = 0.0  # weight of naming picture slots
    # of grpo
    variant: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    clip_low: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28
    kl_beta: Annotated[float, pydantic.Field(ge=0)] = 0.04  # 0: no reference policy is computed
    kl: Literal["k3", "k1"] = "k3"
    advantages: Literal["group", "batch", "none"] = "group"  # what standard deviation they are divided by


class RolloutConfig(Section):
    """What a policy samples for an update; see `policy` and `rollout.Sampling`."""

    samples: Annotated[int, pydantic.Field(ge=2)] = 8  # of a prompt
    rows: Count = 0  # prompts that are sampled at once, over all devices; 0: as many as an update has
    max_tokens: AtLeastOne = 64
    temperature: Positive = 1.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    top_k: Count = 0  # 0: all tokens
    rounds: AtLeastOne = 4  # of sampling at most, until every row has a group whose rewards differ
    updates: AtLeastOne = 1  # on what was sampled
    rewards: dict[Literal["exact", "brier"], Positive] = {"exact": 1.0}  # and their weights

    @pydantic.field_validator("rewards")
    @classmethod
    def _some(cls, rewards: dict[str, float]) -> dict[str, float]:
        if not rewards:
            raise ValueError("name one reward at least")
        return rewards


class OptimizerConfig(Section):
    """AdamW with warm-up and decay."""

    learning_rate: Positive = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0
    final_ratio: Fraction = 0.0  # learning rate at the end, as a share of the peak
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.1
    clip: Annotated[float, pydantic.Field(ge=0)] = 1.0  # global norm; 0: no clipping


class BatchConfig(Section):
    """Rows of a micro-batch over all devices, and how many micro-batches an update takes."""

    rows: AtLeastOne = 2
    accumulation: AtLeastOne = 8


class ProfileConfig(Section):
    """Which updates are traced."""

    start: AtLeastOne = 10
    steps: AtLeastOne = 3


class RunConfig(Section):
    """How long, how often, where to."""

    out: str = "runs/run"
    epochs: Positive = 1.0
    steps: Count = 0  # 0: from epochs
    checkpoint_every: Count = 0  # 0: at the end only
    keep: AtLeastOne = 2  # newest checkpoints
    keep_every: Count = 0  # also those of every so many steps
    keep_best: Count = 0  # also those with the lowest mean loss since the checkpoint before
    skip_limit: Count = 20  # updates with a loss or gradient that is not finite before the run stops; 0: none
    hang_seconds: Count = 900  # after which a wait is reported; 0: never
    hang_exit: bool = False  # and the process ends, so that a launcher can start it again
    heartbeat_seconds: AtLeastOne = 100  # after which a silent process counts as gone
    log_every: AtLeastOne = 1
    progress: bool = True
    wandb: str = ""  # project at Weights & Biases; empty: not sent there
    profile: ProfileConfig | None = None  # a trace of these updates, written into the run's folder
    peak_tflops: Positive | None = None  # of a device; unset: from its name, where that is known


class ParallelConfig(Section):
    """Mesh sizes; -1 takes what is left of the devices."""

    strategy: Literal["mesh", "pmap"] = "mesh"
    data: int = -1
    fsdp: AtLeastOne = 1
    tensor: AtLeastOne = 1


class TrainConfig(Section):
    """`csp train`."""

    seed: Count = 0
    after: str | None = None  # the YAML of a training that has to be finished before this one starts
    prompts: str = ""  # a YAML file of prompts; empty: the package's own
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()

    @pydantic.model_validator(mode="after")
    def _questions_and_policies_go_together(self) -> TrainConfig:
        policy, questions = self.loss.name == "grpo", self.data.recipe.name == "questions"
        field, value = "data.recipe.name", self.data.recipe.name
        if policy and not questions:
            mend = "Use recipe questions, or another loss"
            raise UserError("grpo samples the answers itself", field=field, value=value, mend=mend)
        if questions and not policy:
            raise UserError("questions have no answers to train on", field=field, value=value, mend="Use loss grpo")
        if policy and self.data.recipe.shape.samples > 1:
            field, samples = "data.recipe.shape.samples", self.data.recipe.shape.samples
            raise UserError("grpo asks one question a row", field=field, value=samples, mend="Leave it 1")
        if policy and self.loss.grounding:
            mend = "Leave it 0"
            raise UserError("grpo names no slots", field="loss.grounding", value=self.loss.grounding, mend=mend)
        for reward, asks in {"brier": "confidence", "exact": "answer"}.items():
            if policy and reward in self.rollout.rewards and self.data.recipe.ask != asks:
                mend = f"Set data.recipe.ask to {asks}, or choose another reward"
                problem = f"the reward {reward} judges an answer to another question"
                raise UserError(problem, field="data.recipe.ask", value=self.data.recipe.ask, mend=mend)
        return self


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping."""
    try:
        values = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise UserError("there is no such configuration", file=file, mend="Check the path") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=file, mend="Give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML ({error})", file=file, mend="Correct the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError("must be a mapping of fields", file=file, mend="See configs/ for examples")
    return values


def read_config(file: Path) -> dict[str, Any]:
    """A YAML mapping laid over the one that its `extends:` names, a path from the file's own folder.

    Mappings are laid over field by field; all other values replace.
    """
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    while True:
        if file.resolve() in seen:
            raise UserError(
                "extends itself", file=file, field="extends", mend="Take one of the files out of the circle"
            )
        seen.append(file.resolve())
        values = read_yaml(file)
        below = values.pop("extends", None)
        layers.append(values)
        if below is None:
            return functools.reduce(lay_over, reversed(layers))
        if not isinstance(below, str):
            raise UserError("not a path", file=file, field="extends", value=below, mend="Name one YAML file")
        file = file.parent / below


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the fields of `above` in place of its own."""
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            both[name] = lay_over(below[name], above[name])
    return both


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`a.b=value` settings on top of a mapping; values are read as YAML."""
    result = {**values}
    for override in overrides:
        path, found, text = override.partition("=")
        if not found:
            raise UserError("not a setting", value=override, mend="Write field=value, such as optimizer.clip=0.5")
        node = result
        *parents, last = path.split(".")
        for part in parents:
            child = node.get(part)
            node[part] = {**child} if isinstance(child, dict) else {}
            node = node[part]
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError("not a value", field=path, value=text, mend="Values are read as YAML") from None
    return result


# Errors that are told of a whole section, which is no value to show.
WHOLE_SECTION = frozenset({"missing", "union_tag_invalid", "union_tag_not_found"})
ConfigType = TypeVar("ConfigType", bound=pydantic.BaseModel)


def load_config(
    kind: type[ConfigType],
    file: Path | None,
    overrides: list[str] | None = None,
    *,
    mend: str = "csp doctor --config lists every field with its range",
) -> ConfigType:
    """A validated configuration from a YAML file (see `read_config`) and overrides; UserError names the field."""
    values = apply_overrides(read_config(file) if file else {}, overrides or [])
    try:
        return kind.model_validate(values)
    except UserError as error:  # of fields that do not go together
        raise UserError(error.problem, file=file, field=error.field, value=error.value, mend=error.mend) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            "no such field" if first["type"] == "extra_forbidden" else first["msg"],
            file=file,
            field=".".join(_path(values, first["loc"])),
            value=None if first["type"] in WHOLE_SECTION else first.get("input"),
            mend=mend,
        ) from None


def _path(values: Any, location: tuple[int | str, ...]) -> list[str]:
    """An error's place without the names that tell alternatives apart (`source.pope.files`)."""
    path: list[str] = []
    for part in location:
        if isinstance(values, dict) and values.get("name") == part and part not in values:
            continue
        path.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return path


class WorldSplits(Section):
    """Scenes of each split of the demo's world."""

    train: AtLeastOne = 3000
    validation: AtLeastOne = 64
    test: AtLeastOne = 128


class DemoConfig(Section):
    """`csp demo`: which stages run, on how much; the stages themselves are the files in configs/world."""

    world: str | None = None  # a world's YAML; unset: the embedded world
    base: str = "world"  # the checkpoint folder that every training starts from, `world`: the base of the package
    seeds: tuple[Count, ...] = (0,)
    recipes: tuple[Literal["paper", "evidence"], ...] = ("paper", "evidence")
    splits: WorldSplits = WorldSplits()
    reading: Literal["expected", "greedy"] = "expected"
    resamples: AtLeastOne = 1000
    rows: AtLeastOne = 1  # pictures in an evaluation batch; more is slower on CPUs
    overrides: tuple[str, ...] = ()  # of every stage, such as run.steps=2


def describe_fields(kind: type[Section], prefix: str = "") -> list[dict[str, str]]:
    """Every field of a configuration with its type and default, nested ones under dotted names."""
    rows = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        sections = [part for part in get_args(inner) if isinstance(part, type) and issubclass(part, Section)]
        inner = sections[0] if sections else inner
        if isinstance(inner, type) and issubclass(inner, Section):
            rows += describe_fields(inner, f"{prefix}{name}.")
        else:
            limits = ", ".join(str(limit) for limit in field.metadata)
            shown = getattr(inner, "__name__", str(inner)) if not getattr(inner, "__args__", ()) else str(inner)
            text = shown.replace("typing.", "")
            rows.append({"field": prefix + name, "type": text, "range": limits, "default": repr(field.default)})
    return rows
