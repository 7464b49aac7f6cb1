"""The committed plans: the documentation shows them, they fit, and they are plans of the shipped configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from csp_jax.config import TrainConfig, load_config
from csp_jax.plan.page import markdown
from csp_jax.plan.program import step_program
from csp_jax.plan.run import model_folder
from csp_jax.plan.search import Candidate
from csp_jax.plan.targets import parse_target
from csp_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "docs" / "plans.json").read_text())
CONFIGS = ROOT / "configs"
PAPERS = ("csp", "difficulty")


def test_the_documentation_shows_them():
    assert markdown(ROWS) in (ROOT / "docs" / "plan.md").read_text()


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


def test_every_full_fine_tuning_of_the_papers_has_a_plan_that_fits_on_eight_a100s():
    planned = {row["config"] for row in ROWS if row["target"] == "a100-80g:1x8" and row["recommended"] and row["fits"]}
    full = {f"csp/{file.stem}" for file in (CONFIGS / "csp").glob("*.yaml") if not file.stem.endswith("-lora")}
    assert full <= planned


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["recommended"]], ids=lambda r: f"{r['config']}-{r['target']}"
)
def test_every_recommendation_is_a_configuration(row):
    folder, name = row["config"].split("/")
    file = CONFIGS / folder / "scaled" / f"{name}-{row['target'].replace(':', '-')}.yaml"
    config = load_config(TrainConfig, file)
    candidate = Candidate(**row["mesh"], **row["batch"], remat=row["remat"], attention=row["attention"])
    assert Candidate.of(config, parse_target(row["target"])) == candidate
    assert candidate.apply(config) == config


def test_llava_on_sixty_four_is_at_least_half_of_the_peak():
    (row,) = [
        r for r in ROWS if r["config"] == "csp/llava-7b-sft" and r["target"] == "a100-80g:8x8" and r["recommended"]
    ]
    assert row["estimated_mfu"] >= 0.5


REPLANNED = [f"csp/{name}" for name in ("llava-7b-sft", "llava-7b-sft-lora", "qwen2_vl-7b-simpo", "internvl2-8b-sft")]


def recommended(name: str) -> dict[str, Any]:
    (row,) = [r for r in ROWS if (r["config"], r["target"]) == (name, "a100-80g:1x8") and r["recommended"]]
    return row


@pytest.mark.parametrize("name", REPLANNED)
def test_a_committed_plan_is_one_of_this_code(name):
    """All of a row that needs no compiler of the target, counted again on eight devices that are here."""
    row, file = recommended(name), CONFIGS / f"{name}.yaml"
    candidate = Candidate(**row["mesh"], **row["batch"], remat=row["remat"], attention=row["attention"])
    config = candidate.apply(load_config(TrainConfig, file))
    program = step_program(config, model_folder(config, file), make_mesh(config.parallel, jax.devices()))
    sizes = program.bytes_a_device()
    assert program.parameters() == row["parameters"]
    assert (sizes["parameters"], sizes["optimizer"]) == (row["bytes_parameters"], row["bytes_optimizer"])
    assert program.useful_flops() == row["flops_useful"]
    held = sum(sizes.values())
    assert held == pytest.approx(row["bytes_arguments"], rel=0.001)
