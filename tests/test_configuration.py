"""Configurations: read, overridden, refused with file, field and value named; and the shipped ones are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from csp_jax.config import RecipeConfig, TrainConfig, apply_overrides, describe_fields, load_config, read_config
from csp_jax.errors import UserError
from csp_jax.world.config import WorldConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 4\noptimizer: {learning_rate: 1e-3, clip: 0.5}\ndata: {recipe: {name: paper}}\n")
    return path


def test_file_and_overrides(file):
    config = load_config(TrainConfig, file, ["optimizer.clip=2", "data.recipe.shape.groups=3", "model.freeze=[vision]"])
    assert (config.seed, config.optimizer.learning_rate, config.optimizer.clip) == (4, 1e-3, 2.0)
    assert (config.data.recipe.name, config.data.recipe.shape.groups) == ("paper", 3)
    assert config.model.freeze == ("vision",)
    assert load_config(TrainConfig, None) == TrainConfig()
    assert load_config(TrainConfig, file, ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_overrides_leave_what_they_are_laid_on():
    values = {"a": {"b": 1}, "c": 2}
    assert apply_overrides(values, ["a.b=3", "d.e=[1, x]", "c="]) == {"a": {"b": 3}, "c": None, "d": {"e": [1, "x"]}}
    assert values == {"a": {"b": 1}, "c": 2}


def test_what_is_written_is_read_back(tmp_path):
    config = load_config(
        TrainConfig, None, ["data.recipe.confidence_levels={80: 0.5, 100: 0.5}", "model.freeze=[a, b]", "seed=3"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(TrainConfig, file) == config


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("optimizer.learning_rte=1", "optimizer.learning_rte", 1),
        ("lossy.name=sft", "lossy", {"name": "sft"}),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate", -1),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate", float("inf")),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay", float("inf")),
        ("optimizer.beta1=1.5", "optimizer.beta1", 1.5),
        ("optimizer.schedule=step", "optimizer.schedule", "step"),
        ("noise.noise_gamma=1", "noise.noise_gamma", 1),
        ("noise.t_max=0", "noise.t_max", 0),
        ("noise.name=quadratic", "noise.name", "quadratic"),
        ("loss.label_smoothing=0.5", "loss.label_smoothing", 0.5),
        ("data.recipe.clean=1.01", "data.recipe.clean", 1.01),
        ("data.recipe.grid=7", "data.recipe.grid", 7),
        ("data.recipe.name=papr", "data.recipe.name", "papr"),
        ("data.recipe.shape.prompt=0", "data.recipe.shape.prompt", 0),
        ("batch.rows=two", "batch.rows", "two"),
        ("seed=-1", "seed", -1),
        ("run.epochs=0", "run.epochs", 0),
    ],
)
def test_mistakes_are_named(file, override, field, value):
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, file, [override])
    assert (caught.value.file, caught.value.field, caught.value.value) == (file, field, value)
    assert caught.value.mend
    assert str(caught.value).startswith(f"{file}: {field} = ")


@pytest.mark.parametrize(
    ("overrides", "field", "problem"),
    [
        (["data.recipe.name=evidence"], "data.recipe.name", "samples the answers itself"),
        (["loss.name=sft"], "data.recipe.name", "no answers to train on"),
        (["loss.grounding=0.3"], "loss.grounding", "names no slots"),
        (["rollout.rewards={brier: 1.0}"], "data.recipe.ask", "another question"),
        (["data.recipe.ask=confidence"], "data.recipe.ask", "another question"),
        (["rollout.rewards={}"], "rollout.rewards", "one reward at least"),
        (["rollout.rewards={exact: 0}"], "rollout.rewards.exact", "greater than 0"),
        (["rollout.rewards={exactly: 1}"], "rollout.rewards.exactly.[key]", "'exact' or 'brier'"),
        (["rollout.samples=1"], "rollout.samples", "greater than or equal to 2"),
        (["rollout.temperature=0"], "rollout.temperature", "greater than 0"),
        (["rollout.top_p=1.5"], "rollout.top_p", "less than or equal to 1"),
        (["rollout.rounds=0"], "rollout.rounds", "greater than or equal to 1"),
        (["loss.clip_low=1"], "loss.clip_low", "less than 1"),
        (["loss.kl_beta=-1"], "loss.kl_beta", "greater than or equal to 0"),
        (["loss.variant=ppo"], "loss.variant", "grpo"),
    ],
)
def test_what_a_policy_cannot_be_is_refused(overrides, field, problem):
    file = CONFIGS / "world" / "grpo.yaml"
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, file, overrides)
    assert (caught.value.file, caught.value.field) == (file, field)
    assert problem in caught.value.problem
    assert caught.value.mend


def test_a_percentage_out_of_range_is_named():
    with pytest.raises(UserError, match="120 is not a percentage") as caught:
        load_config(RecipeConfig, None, ["confidence_levels={120: 1.0}"])
    assert caught.value.field == "confidence_levels"


@pytest.mark.parametrize("override", ["seed", "optimizer.clip"])
def test_a_setting_without_value_is_refused(override):
    with pytest.raises(UserError, match="not a setting") as caught:
        load_config(TrainConfig, None, [override])
    assert caught.value.value == override


def test_a_setting_that_is_no_yaml_is_refused():
    with pytest.raises(UserError, match="not a value") as caught:
        load_config(TrainConfig, None, ["model.freeze=[vision"])
    assert (caught.value.field, caught.value.value) == ("model.freeze", "[vision")


@pytest.mark.parametrize(
    ("text", "problem"),
    [(b"seed: [1", "not YAML"), (b"- 1\n- 2\n", "mapping"), (b"\xff\xfe\x00", "not YAML"), (b"seed", "mapping")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, problem):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=problem) as caught:
        load_config(TrainConfig, file)
    assert caught.value.file == file


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such configuration"):
        load_config(TrainConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_config(TrainConfig, tmp_path)
    assert caught.value.file == tmp_path
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(TrainConfig, tmp_path / "empty.yaml") == TrainConfig()


def test_a_file_lies_over_the_one_that_it_extends(tmp_path, file):
    (tmp_path / "more").mkdir()
    middle, top = tmp_path / "more" / "middle.yaml", tmp_path / "more" / "top.yaml"
    middle.write_text("extends: ../run.yaml\noptimizer: {clip: 2.0}\nmodel: {freeze: [vision]}\n")
    top.write_text("extends: middle.yaml\nseed: 5\nmodel: {freeze: [projector]}\n")
    config = load_config(TrainConfig, top, ["optimizer.beta2=0.9"])
    assert (config.seed, config.data.recipe.name, config.model.freeze) == (5, "paper", ("projector",))
    assert (config.optimizer.learning_rate, config.optimizer.clip, config.optimizer.beta2) == (1e-3, 2.0, 0.9)


@pytest.mark.parametrize(
    ("text", "problem"), [("extends: bad.yaml", "extends itself"), ("extends: [a]", "not a path"), ("extends: x", "no")]
)
def test_what_cannot_be_extended_is_named(tmp_path, text, problem):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_config(TrainConfig, file)


def test_configurations_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().seed = 3


TRAININGS = sorted(file for file in CONFIGS.rglob("*.yaml") if "loss" in read_config(file))


@pytest.mark.parametrize("file", TRAININGS, ids=lambda file: file.stem)
def test_shipped_trainings_are_valid(file):
    config = load_config(TrainConfig, file)
    if config.data.recipe.name == "evidence":
        assert config.data.recipe.region == "square"  # others say what is buried: see tests/data/test_recipe_leaks.py
    if config.loss.name == "simpo":
        assert (config.loss.beta, config.loss.simpo_gamma, config.loss.nll_weight) == (2.0, 1.0, 0.0)  # printed


def test_trainings_and_worlds_are_shipped():
    assert len(TRAININGS) >= 5
    WorldConfig(**yaml.safe_load((CONFIGS / "world" / "world.yaml").read_text()))


def test_every_field_is_described():
    fields = {row["field"]: row for row in describe_fields(TrainConfig)}
    for name in ("seed", "optimizer.learning_rate", "data.recipe.shape.prompt", "loss.simpo_gamma"):
        assert name in fields
    assert fields["loss.beta"]["default"] == "2.0"
    assert not any(name in fields for name in ("optimizer", "data.recipe"))
