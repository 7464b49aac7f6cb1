"""`csp plan` itself, where the compilers of the `plan` extra are; what it says where they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.families.registry import open_family
from csp_jax.models.registry import family_of
from csp_jax.plan.compile import compiled_cost, measure, needed_bytes
from csp_jax.plan.compilers import Compiler, require_compiler
from csp_jax.plan.program import step_program
from csp_jax.plan.run import make_plans, model_folder
from csp_jax.plan.search import Candidate
from csp_jax.plan.targets import parse_target
from csp_jax.sharding import make_mesh
from csp_jax.world import BASE

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "configs" / "csp").glob("*.yaml"))
PACKAGES = Path(os.environ.get("CSP_PLAN_PACKAGES", ROOT / "build" / "plan"))


def test_missing_compilers_are_named_with_the_command(tmp_path):
    for target, package in (("a100-80g:1x8", "jax-cuda12-plugin"), ("v5e:4x8", "libtpu")):
        with pytest.raises(UserError, match=package) as caught:
            require_compiler(parse_target(target), tmp_path)
        assert "pip install 'csp_jax[plan]'" in str(caught.value.mend)


def compilers(target: str) -> Path | None:
    for packages in (None, PACKAGES):
        try:
            require_compiler(parse_target(target), packages)
        except UserError:
            continue
        return packages
    pytest.skip("the compilers are not installed: make plan-compilers")


@pytest.mark.slow
def test_a_step_on_devices_that_are_here():
    """Everything but the target's compiler: the embedded base on eight devices, made and read as for others."""
    settings = ["batch.rows=8", "batch.accumulation=2", "parallel.fsdp=8"]
    config, target = load_config(TrainConfig, None, settings), parse_target("a100-80g:1x8")
    request = {"config": config.model_dump(mode="json"), "folder": str(BASE)}
    found = measure(request, target, jax.devices())
    sizes = found["bytes_a_device"]
    held = sizes["parameters"] + sizes["optimizer"]
    assert held == pytest.approx(12 * found["parameters"] / 8, rel=0.1)  # but for what is small
    assert sum(sizes.values()) == pytest.approx(found["bytes_arguments"], rel=0.01)
    assert found["flops_executed"] == pytest.approx(found["flops_useful"], rel=0.1)
    gathered = found["collectives"]["all-gather"]
    assert gathered >= 4 * found["parameters"] * 2 * 0.9  # every weight, for each micro-batch
    assert 0 < found["mfu"] < 1


@pytest.mark.slow
def test_a_policys_plan_holds_its_sampler():
    """Its time grows by as much with every token, its memory by the keys and values of all layers at least."""
    settings = ["batch.rows=8", "parallel.fsdp=8", "loss.name=grpo", "data.recipe.name=questions", "noise.name=none"]
    target, found, work = parse_target("a100-80g:1x8"), {}, {}
    for tokens in (33, 65, 129):
        config = load_config(TrainConfig, None, [*settings, f"rollout.max_tokens={tokens}"])
        program = step_program(config, BASE, make_mesh(config.parallel, jax.devices()))
        found[tokens] = compiled_cost(program.lower_sampler(), target, tokens - 1)
        work[tokens] = found[tokens]["seconds"]
    assert 0 < work[33] < work[65]
    # A token attends to the room of all tokens: a little more in longer answers.
    assert 2 <= (work[129] - work[65]) / (work[65] - work[33]) < 2.5
    text = nnx.merge(program.graphdef, program.state.trainable, program.state.frozen).decoder.config
    a_token = text.num_layers * 2 * text.num_kv_heads * text.head_dim * 4
    grown = found[129]["bytes_temporaries"] - found[65]["bytes_temporaries"]
    assert grown >= 64 * config.rollout.samples * a_token  # of the one row of a device
    both = measure({"config": config.model_dump(mode="json"), "folder": str(BASE)}, target, jax.devices())
    assert both["sampling"] == {"bytes_peak": found[129]["bytes_peak"], "seconds": work[129]}
    assert both["bytes_peak"] >= found[129]["bytes_peak"]


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm.", 120.5),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (195.50G) exceeds available", 195.5),
        ("Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_a_tpu_compiler_says_is_too_much(message, gibibytes):
    assert needed_bytes(message) == (None if gibibytes is None else gibibytes * 2**30)


@pytest.mark.heavy
def test_a_committed_plan_is_found_again():
    """One row, compiled anew for eight A100s."""
    rows = json.loads((ROOT / "docs" / "plans.json").read_text())
    target, file = "a100-80g:1x8", ROOT / "configs" / "csp" / "qwen_vl-7b-sft.yaml"
    packages = compilers(target)
    (row,) = [r for r in rows if (r["config"], r["target"]) == ("csp/qwen_vl-7b-sft", target) and r["recommended"]]
    candidate = Candidate(**row["mesh"], **row["batch"], remat=row["remat"], attention=row["attention"])
    config = candidate.apply(load_config(TrainConfig, file))
    with Compiler(parse_target(target), packages) as compiler:
        found = compiler.measure(config, model_folder(config, file))
    assert "error" not in found
    assert found["bytes_peak"] == pytest.approx(row["bytes_peak"], rel=0.01)
    assert found["mfu"] == pytest.approx(row["estimated_mfu"], rel=0.02)
    assert sum(found["collectives"].values()) == pytest.approx(sum(row["collectives"].values()), rel=0.02)


@pytest.mark.heavy
def test_a_small_step_for_gpus_that_are_not_here(tmp_path):
    """The embedded base on two A100s: bytes match arithmetic, weights are gathered, the estimate is possible."""
    file = tmp_path / "world.yaml"
    file.write_text(
        "model: {dtype: bfloat16}\nloss: {name: sft}\nbatch: {rows: 8, accumulation: 2}\nparallel: {fsdp: 2}\n"
    )
    (plan,) = make_plans([file], ["a100-80g:1x2"], packages=compilers("a100-80g:1x2"), only=True)
    (row,) = plan.rows()
    assert row["error"] is None
    assert row["fits"]
    held = row["bytes_parameters"] + row["bytes_optimizer"]
    assert held == pytest.approx(12 * row["parameters"] / 2, rel=0.1)  # but for what is small or frozen
    assert held < row["bytes_arguments"] < row["bytes_peak"] <= row["bytes_available"]
    assert row["collectives"]["all-gather"] > 0
    assert 0 < row["estimated_mfu"] < 1
    assert row["flops_executed"] == pytest.approx(row["flops_useful"], rel=0.2)


@pytest.mark.heavy
@pytest.mark.parametrize(("target", "attention"), [("a100-80g:1x1", "pallas"), ("v5e:2x2", "splash")])
def test_attention_kernels_compile_for_what_is_not_here(target, attention):
    """Forward and both backward kernels, of the head sizes that models have; nothing grows with the prompt's square."""
    packages = compilers(target)
    path = [str(ROOT), *([str(packages)] if packages else [])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_child.py")), target, attention],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"64", "80", "96", "104", "128"}
    for channels, program in found.items():
        assert program["kernels"] == 3, channels
        assert program["temporaries"] < program["logits"] / 4, channels


def test_attention_that_cannot_be_planned_is_named(tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text("model: {dtype: bfloat16}\nbatch: {rows: 8}\n")
    for target, attention, said in (
        ("v5e:2x2", "pallas", "for NVIDIA GPUs"),
        ("a100-80g:1x2", "splash", "for TPUs"),
        ("a100-80g:1x2", "cudnn", "on the card alone"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            make_plans([file], [target], overrides=[f"model.attention={attention}"])
        assert caught.value.field == "model.attention"


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_the_papers_rows_hold_a_picture(file):
    """Prompt slots and cells of the largest picture of the family, and words before it."""
    import numpy as np
    from PIL import Image

    config = load_config(TrainConfig, file)
    family = open_family(model_folder(config, file), words=False)
    shape = config.data.recipe.shape
    for size in ((640, 480), (480, 640), (1000, 1000), (300, 900)):
        picture = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
        canvas = family.canvas(picture)
        rows, columns = canvas.shape[0] // family.cell[0], canvas.shape[1] // family.cell[1]
        cells = rows * columns + (family.overview(picture) is not None)
        assert family.image_tokens(canvas) + 8 <= shape.prompt, size
        assert cells <= max(shape.cells, 1), size


def test_every_family_has_both_methods():
    found = {(family_of_file(file), load_config(TrainConfig, file).loss.name) for file in PAPERS}
    families = {family for family, _ in found}
    assert families == {"llava", "qwen2_vl", "internvl2", "phi3_vision", "qwen_vl"}
    assert {(family, method) for family in families for method in ("sft", "simpo")} <= found


def family_of_file(file: Path) -> str:
    from csp_jax.models.hub import HubConfig

    return family_of(HubConfig.read(model_folder(load_config(TrainConfig, file), file)))


def test_the_models_numbers_are_the_published_ones():
    released = json.loads((ROOT / "tests" / "golden" / "full_size.json").read_text())
    published = [entry["config"] for entry in released.values()]
    for file in (ROOT / "configs" / "models").glob("*/config.json"):
        assert json.loads(file.read_text()) in published, file
