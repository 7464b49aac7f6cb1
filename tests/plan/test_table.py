"""The committed plans: the documentation shows them, they fit, and they are plans of the shipped configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from csp_jax.config import TrainConfig, load_config
from csp_jax.plan.page import markdown, markdown_of_misfits
from csp_jax.plan.program import step_program
from csp_jax.plan.run import model_folder
from csp_jax.plan.search import Candidate
from csp_jax.plan.targets import parse_target
from csp_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "docs" / "plans.json").read_text())
CONFIGS = ROOT / "configs"
PAPERS = ("csp", "difficulty")


def candidate_of(row: dict[str, Any]) -> Candidate:
    return Candidate(**row["mesh"], **row["batch"], remat=row["remat"], attention=row["attention"])


def recommended(name: str, target: str = "a100-80g:1x8") -> dict[str, Any]:
    (row,) = [r for r in ROWS if (r["config"], r["target"]) == (name, target) and r["recommended"]]
    return row


def test_the_documentation_shows_them():
    """What is recommended, and what does not fit and why."""
    page = (ROOT / "docs" / "plan.md").read_text()
    assert markdown(ROWS) in page
    assert markdown_of_misfits(ROWS) in page


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['config']}-{row['target']}-{row['batch']['rows']}")
def test_a_plan_is_of_a_shipped_configuration(row):
    config = load_config(TrainConfig, CONFIGS / f"{row['config']}.yaml")
    target = parse_target(row["target"])
    assert row["devices"] == target.devices
    assert row["bytes_available"] == target.card.available
    sizes = row["mesh"]
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == target.devices
    assert row["batch"]["rows"] % (sizes["data"] * sizes["fsdp"]) == 0
    assert row["fits"] == (row["error"] is None and row["bytes_peak"] <= row["bytes_available"])
    if config.model.lora is None and row["error"] is None:  # two float32 moments of nearly all parameters
        assert row["bytes_optimizer"] < 8 * row["parameters"] / (sizes["fsdp"] * sizes["tensor"]) * 1.1


@pytest.mark.parametrize("target", ["a100-80g:1x8", "a100-80g:8x8", "a100-80g:32x8", "v5p:4x4x4"])
def test_every_training_of_the_papers_has_a_plan_that_fits(target):
    """Full fine-tuning and adapters; SFT, SimPO and GRPO."""
    planned = {row["config"] for row in ROWS if row["target"] == target and row["recommended"] and row["fits"]}
    assert planned == {f"{folder}/{file.stem}" for folder in PAPERS for file in (CONFIGS / folder).glob("*.yaml")}


@pytest.mark.parametrize("name", sorted({row["config"] for row in ROWS}))
def test_a_configuration_was_tried_as_it_is(name):
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    tried = [candidate_of(row) for row in ROWS if (row["config"], row["target"]) == (name, "a100-80g:1x8")]
    assert Candidate.of(config, parse_target("a100-80g:1x8")) in tried


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["recommended"]], ids=lambda r: f"{r['config']}-{r['target']}"
)
def test_every_recommendation_is_a_configuration(row):
    folder, name = row["config"].split("/")
    file = CONFIGS / folder / "scaled" / f"{name}-{row['target'].replace(':', '-')}.yaml"
    config = load_config(TrainConfig, file)
    candidate = candidate_of(row)
    assert Candidate.of(config, parse_target(row["target"])) == candidate
    assert candidate.apply(config) == config


@pytest.mark.parametrize("method", ["sft", "simpo"])
@pytest.mark.parametrize("family", ["llava-7b", "qwen2_vl-7b", "internvl2-8b", "phi3_vision-4b", "qwen_vl-7b"])
def test_full_fine_tuning_on_sixty_four_is_at_least_half_of_the_peak(family, method):
    row = recommended(f"csp/{family}-{method}", "a100-80g:8x8")
    assert row["fits"]
    assert row["estimated_mfu"] >= 0.5


REPLANNED = [f"csp/{name}" for name in ("llava-7b-sft", "llava-7b-sft-lora", "qwen2_vl-7b-simpo", "internvl2-8b-sft")]


@pytest.mark.parametrize("name", REPLANNED)
def test_a_committed_plan_is_one_of_this_code(name):
    """All of a row that needs no compiler of the target, counted again on eight devices that are here."""
    row, file = recommended(name), CONFIGS / f"{name}.yaml"
    candidate = candidate_of(row)
    config = candidate.apply(load_config(TrainConfig, file))
    program = step_program(config, model_folder(config, file), make_mesh(config.parallel, jax.devices()))
    sizes = program.bytes_a_device()
    assert program.parameters() == row["parameters"]
    assert (sizes["parameters"], sizes["optimizer"]) == (row["bytes_parameters"], row["bytes_optimizer"])
    assert program.useful_flops() == row["flops_useful"]
    held = sum(sizes.values())
    assert held == pytest.approx(row["bytes_arguments"], rel=0.001)
