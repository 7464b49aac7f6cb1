"""The search over batch, recomputation and mesh, on a machine whose memory and speed are formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csp_jax.config import TrainConfig, load_config
from csp_jax.errors import UserError
from csp_jax.plan.page import page, rows
from csp_jax.plan.run import best_of
from csp_jax.plan.search import Candidate, describe, recommend, search
from csp_jax.plan.targets import parse_target

GIB = 1 << 30
KEPT = {"none": 20, "weights": 4, "save_names": 2, "full": 1}  # GiB of activations of a row


class Machine:
    """State of `weights` GiB split over fsdp and tensor, activations by row; small batches are slow.

    `kernel`: how much faster the attention kernel makes a step.
    """

    def __init__(self, weights: float, kernel: float = 0.9):
        self.weights, self.kernel = weights, kernel
        self.asked: list[TrainConfig] = []

    def __call__(self, config: TrainConfig, folder: Path) -> dict[str, Any]:
        self.asked.append(config)
        mesh = config.parallel
        rows = config.batch.rows / (mesh.data * mesh.fsdp)
        state = self.weights * GIB / (mesh.fsdp * mesh.tensor)
        activations = KEPT[config.model.remat] * rows * GIB / mesh.tensor
        speed = rows / (rows + 1) * (0.7 if config.model.remat == "full" else 0.8)
        speed *= self.kernel if config.model.attention == "pallas" else 1.0
        return {
            "parameters": 1, "flops_useful": 1e15, "flops_executed": 1e15, "seconds": 1.0, "seconds_products": 1.0,
            "seconds_traffic": 1.0, "seconds_wires": 1.0, "compile_seconds": 1.0, "collectives": {"all-gather": 5},
            "bytes_a_device": {"parameters": state / 3, "optimizer": state * 2 / 3, "batch": 0},
            "bytes_arguments": state, "bytes_temporaries": activations, "bytes_peak": state + activations, "mfu": speed,
        }  # fmt: skip


def config(**settings: Any) -> TrainConfig:
    return load_config(TrainConfig, None, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()])


BASE = {"parallel__fsdp": 8, "batch__rows": 8, "batch__accumulation": 8, "model__remat": "none"}
EIGHT = parse_target("a100-80g:1x8")


def test_more_rows_as_long_as_they_fit_and_pay():
    """As configured, with the kernel (slower on this machine), then twice the rows up to eight a device."""
    machine = Machine(80)
    trials = search(config(**{**BASE, "model__remat": "weights"}), Path(), EIGHT, machine)
    assert [trial.candidate.rows for trial in trials] == [8, 8, 16, 32, 64]
    assert [trial.candidate.attention for trial in trials] == ["xla", "pallas", "xla", "xla", "xla"]
    assert recommend(trials) is trials[-1]
    assert {trial.candidate.update for trial in trials} == {64}  # an update keeps its size
    assert [asked.batch.rows for asked in machine.asked] == [8, 8, 16, 32, 64]


def test_the_attention_kernel_is_taken_where_it_pays():
    settings = config(**{**BASE, "model__remat": "weights"})
    trials = search(settings, Path(), EIGHT, Machine(80, kernel=1.2))
    assert [trial.candidate.attention for trial in trials] == ["xla"] + ["pallas"] * 4
    assert recommend(trials) is trials[-1]
    assert describe(trials[-1].candidate).endswith("attention pallas")
    assert trials[-1].candidate.apply(settings).model.attention == "pallas"
    assert all(row["attention"] for row in rows("name", EIGHT, trials))
    assert {t.candidate.attention for t in search(settings, Path(), parse_target("v5p:2x2x2"), Machine(80, 1.2))} == {
        "xla"
    }
    own = search(
        config(**{**BASE, "model__remat": "weights", "model__attention": "pallas"}), Path(), EIGHT, Machine(80)
    )
    assert {trial.candidate.attention for trial in own} == {"pallas"}


def test_what_was_best_elsewhere_is_tried_after_the_configuration_itself():
    """Where that does not fit, up from what does; a configuration for other machines is not tried."""
    settings = config(**{**BASE, "model__remat": "weights"})
    known = Candidate(1, 8, 1, 64, 1, "weights", "pallas")
    trials = search(settings, Path(), EIGHT, Machine(80, kernel=1.2), known=known)
    assert [trial.candidate.rows for trial in trials] == [8, 8, 64]
    assert recommend(trials).candidate == known
    larger = search(settings, Path(), EIGHT, Machine(8 * 60, kernel=1.2), known=known)
    assert [(t.candidate.rows, t.fits) for t in larger] == [(8, True), (8, True), (64, False), (16, True)]
    elsewhere = parse_target("a100-80g:8x8")
    grown = Candidate(8, 8, 1, 512, 1, "weights", "pallas")
    assert [t.candidate for t in search(settings, Path(), elsewhere, Machine(80), known=grown)] == [grown]


def test_an_update_grows_only_on_more_devices_than_the_configuration_is_for():
    settings = config(**{**BASE, "batch__accumulation": 2, "model__remat": "weights"})
    known = Candidate(1, 8, 1, 64, 1, "weights", "pallas")
    for start in (None, known):
        trials = search(settings, Path(), EIGHT, Machine(80), known=start)
        assert {trial.candidate.update for trial in trials} == {16}
    more = search(settings, Path(), parse_target("a100-80g:8x8"), Machine(80))
    assert [trial.candidate.update for trial in more] == [64, 64, 128, 256, 512]


def test_what_does_not_compile_is_not_made_smaller():
    trials = search(config(**BASE), Path(), EIGHT, lambda config, folder: {"error": "no such instruction"})
    assert len(trials) == 1
    assert "Does not compile: no such instruction" in page("name", config(**BASE), EIGHT, trials)


def test_plans_begin_with_what_was_best_before(tmp_path):
    """Of rows of earlier plans: the recommended one with the highest estimate, of the same model on the same card."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "csp").mkdir()
    for name in ("one", "two"):
        (tmp_path / "csp" / f"{name}.yaml").write_text(f"model: {{checkpoint: {checkpoint}}}\nseed: 1\n")
    made = [
        {**row, "config": f"csp/{name}"}
        for name, weights in (("one", 80), ("two", 300))
        for row in rows(name, EIGHT, search(config(**BASE), Path(), EIGHT, Machine(weights, kernel=1.5)))
    ]
    known = best_of([*made, {**made[0], "config": "csp/gone"}], tmp_path)
    best = max((row for row in made if row["recommended"]), key=lambda row: row["estimated_mfu"])
    (candidate,) = known.values()
    assert list(known) == [(checkpoint, "a100-80g", 8)]
    assert (candidate.rows, candidate.remat, candidate.attention) == (best["batch"]["rows"], best["remat"], "pallas")
    assert candidate.mesh == best["mesh"]


def test_less_is_kept_before_rows_are_given_up():
    trials = search(config(**{**BASE, "batch__rows": 32, "batch__accumulation": 2}), Path(), EIGHT, Machine(80))
    tried = [(trial.candidate.attention, trial.candidate.remat) for trial in trials]
    assert tried[:3] == [("xla", "none"), ("pallas", "none"), ("pallas", "weights")]
    assert not trials[1].fits
    assert recommend(trials).candidate.remat == "weights"
    text = page("name", config(**{**BASE, "batch__rows": 32, "batch__accumulation": 2}), EIGHT, trials)
    assert "does not fit: a device needs 90.0 GiB of 72.9, most of it activations (80.0 GiB)" in text


def test_what_does_not_fit_of_a_configuration_for_other_machines_is_said():
    settings = config(**{**BASE, "batch__rows": 16, "batch__accumulation": 4, "model__remat": "weights"})
    target = parse_target("a100-40g:1x4")
    text = page("name", settings, target, search(settings, Path(), target, Machine(130)))
    assert "the mesh takes 8 devices" in text
    assert (
        "(2 a device) x 8, remat weights): does not fit: a device needs 40.5 GiB of 36.2, most of it optimizer" in text
    )


def test_what_does_not_fit_at_all_is_said():
    trials = search(config(**BASE), Path(), EIGHT, Machine(8 * 100))
    assert recommend(trials) is None
    text = page("name", config(**BASE), EIGHT, trials)
    assert "Does not fit: a device needs" in text
    assert "most of it optimizer" in text
    assert not any(row["fits"] or row["recommended"] for row in rows("name", EIGHT, trials))


def test_other_numbers_of_devices():
    """Weights are split within a host, rows over hosts; rows a device stay as configured."""
    trials = search(config(**BASE), Path(), parse_target("a100-80g:8x8"), Machine(80), only=True)
    assert describe(trials[0].candidate) == "data 8 x fsdp 8 x tensor 1, 64 rows (1 a device) x 1, remat none"
    two = search(config(**BASE), Path(), parse_target("a100-80g:2x4"), Machine(80), only=True)[0].candidate
    assert (two.data, two.fsdp) in ((1, 8), (2, 4))


def test_a_mesh_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="the mesh takes 3") as caught:
        Candidate.of(config(parallel__fsdp=3, parallel__data=1), EIGHT)
    assert caught.value.field == "parallel"
    with pytest.raises(UserError, match="rows must divide") as caught:
        Candidate.of(config(parallel__fsdp=8, batch__rows=12), EIGHT)
    assert caught.value.field == "batch.rows"


def test_the_rows_have_what_is_asked_for():
    trials = search(config(**BASE), Path(), EIGHT, Machine(80), only=True)
    (row,) = rows("name", EIGHT, trials)
    wanted = "target devices mesh batch remat parameters bytes_arguments bytes_temporaries bytes_peak bytes_available"
    wanted += " fits flops_useful collectives compile_seconds"
    assert set(wanted.split()) <= set(row)
    assert row["recommended"]
    assert row["bytes_available"] == EIGHT.card.available
