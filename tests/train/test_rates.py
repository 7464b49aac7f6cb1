"""Rates against closed forms, on a clock that is set by hand; what is counted of a batch, by hand."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import IMAGE_TOKEN, SIDE, SLOTS, pack, random_picture, stack

from csp_jax.config import RunConfig
from csp_jax.data.batch import CHOSEN, PLAIN, REJECTED, Batch, Branch, Sample, Shape, with_policy
from csp_jax.errors import UserError
from csp_jax.plan.targets import CARDS
from csp_jax.train.peaks import peak_flops
from csp_jax.train.rates import Rates
from csp_jax.train.step import batch_sizes
from csp_jax.train.telemetry import Telemetry
from csp_jax.train.weights_and_biases import Board, require_wandb


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def update(clock: Clock, rates: Rates, seconds: float, waited: float, **work: float) -> None:
    """A wait for data and the rest of an update's time."""
    with rates.waiting_for_data():
        clock.now += waited
    clock.now += seconds - waited
    rates.done(**work)


WORK = {"tokens": 1000, "images": 4, "samples": 8, "flops": 3e12}


def test_the_first_update_has_no_rate():
    clock = Clock()
    rates = Rates(peak=1e12, clock=clock)
    update(clock, rates, 60.0, 5.0, **WORK)
    assert rates.line() == {"first_seconds": 60.0}
    update(clock, rates, 4.0, 1.0, **WORK)
    assert rates.line() == {
        "seconds": 4.0,
        "data_seconds": 1.0,
        "tokens_per_second": 250.0,
        "images_per_second": 1.0,
        "samples_per_second": 2.0,
        "mfu": 0.75,
    }


def test_a_line_of_several_updates_is_of_all_of_them():
    """Sums over times, so that a slow update counts as long as it took; the compiling one is left out."""
    clock = Clock()
    rates = Rates(peak=1e12, clock=clock)
    update(clock, rates, 60.0, 5.0, **WORK)
    update(clock, rates, 2.0, 0.0, **WORK)
    update(clock, rates, 8.0, 3.0, **{**WORK, "tokens": 3000})
    found = rates.line()
    assert found["first_seconds"] == 60.0
    assert (found["seconds"], found["data_seconds"]) == (5.0, 1.5)
    assert (found["tokens_per_second"], found["samples_per_second"]) == (400.0, 1.6)
    assert found["mfu"] == pytest.approx(6e12 / 10 / 1e12)
    update(clock, rates, 1.0, 0.25, **WORK)
    again = rates.line()
    assert "first_seconds" not in again
    assert (again["seconds"], again["data_seconds"], again["tokens_per_second"]) == (1.0, 0.25, 1000.0)


def test_no_mfu_without_peak_or_work():
    for peak, work in ((None, WORK), (1e12, {**WORK, "flops": 0.0})):
        clock = Clock()
        rates = Rates(peak=peak, clock=clock)
        for _ in range(2):
            update(clock, rates, 1.0, 0.0, **work)
        assert "mfu" not in rates.line()


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_every_third_step_and_the_last(tmp_path):
    """Seven updates of a second each: metrics are of the step that a line names, rates of all since the line before."""
    clock = Clock()
    rates = Rates(clock=clock)
    with Telemetry(tmp_path, total=7, start=0, title="t", progress=False, log_every=3, rates=rates) as telemetry:
        for step in range(1, 8):
            clock.now += 1.0
            metrics = {"loss": 1 / step, "tokens": 10 * step, "slots": 100, "images": 2, "samples": 4}
            telemetry.log(step, metrics, Counter(drawn=2))
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [3, 6, 7]
    assert [row["tokens_per_second"] for row in found] == [25.0, 50.0, 70.0]
    assert [row["padding"] for row in found] == pytest.approx([0.7, 0.4, 0.3])
    assert [row["counts"]["drawn"] for row in found] == [6, 12, 14]
    assert all(row["seconds"] == 1.0 and row["samples_per_second"] == 4.0 for row in found)
    assert not {"tokens", "images", "samples", "slots", "mfu"} & {name for row in found for name in row}


def test_a_run_that_goes_on_drops_the_lines_that_it_will_write_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0, "counts": {"drawn": 2 * step}}) for step in range(1, 5)]
    file.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    options = {"total": 9, "title": "t", "progress": False, "log_every": 1}
    with Telemetry(tmp_path, start=3, rates=Rates(clock=Clock()), **options) as telemetry:
        metrics = {"loss": 2.0, "tokens": 1, "slots": 1, "images": 1, "samples": 1}
        telemetry.log(4, metrics, Counter(drawn=2))
    found = rows(file)
    assert [(row["step"], row["loss"]) for row in found] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert found[-1]["counts"] == {"drawn": 8}


def words(*tokens: int, role: int = PLAIN, fed: int = 0) -> Branch:
    return Branch(tokens, (0.0,) * fed + (1.0,) * (len(tokens) - fed), role)


def window() -> Batch:
    """Two micro-batches of two rows; one row is empty, one has no picture."""
    generator = np.random.default_rng(0)
    prompt = (1, *(IMAGE_TOKEN,) * SLOTS, 7, 8)
    pair = (words(10, 11, 12, 13, role=CHOSEN, fed=2), words(10, 11, 14, 15, role=REJECTED, fed=2))
    shown = Sample(prompt, (random_picture(generator, 50.0),), (pair, (words(20, 21),)))
    told = Sample((1, 5, 6), (), ((words(30, 31, 32),),))
    shape = Shape(2, 12, 2, 16, 14, 5, 1, (SIDE, SIDE))
    return stack([pack(shape, [shown, told], share_rows=False), pack(shape, [shown], share_rows=False)])


def test_what_an_update_reads_by_hand():
    """A prompt counts once for all its branches, what two branches share once, what nothing follows not at all."""
    prompt, pair, plain, other = 1 + SLOTS + 2, 2 + 2, 1, 2  # of the pair: two shared, one of each
    sizes = {name: int(value) for name, value in batch_sizes(window()).items()}
    assert sizes == {
        "tokens": 2 * (prompt + pair + plain) + 3 + other,
        "images": 2,
        "samples": 2 * (2 + 1) + 1,
        "slots": 4 * (12 + 2 * 16),
    }


def test_a_response_that_is_filtered_is_not_trained_on():
    batch = window()
    flat = with_policy(Batch(**{name: getattr(batch, name)[0] for name in Batch.ARRAYS}, groups=batch.groups))
    weight = np.ones_like(flat.response_weight)
    weight[0] = 0.0
    assert int(batch_sizes(dataclasses.replace(flat, response_weight=weight))["samples"]) == 1


def test_peaks_by_the_names_of_devices():
    known = {
        "NVIDIA A100-SXM4-80GB": CARDS["a100-80g"],
        "NVIDIA A100-SXM4-40GB": CARDS["a100-40g"],
        "NVIDIA A100 80GB PCIe": CARDS["a100-80g"],
        "NVIDIA H100 80GB HBM3": CARDS["h100-80g"],
        "TPU v5 lite": CARDS["v5e"],
        "TPU v5": CARDS["v5p"],
        "TPU v5p": CARDS["v5p"],
        "TPU v6 lite": CARDS["v6e"],
    }
    for name, card in known.items():
        assert peak_flops(name) == card.flops, name
    assert peak_flops("NVIDIA H100 PCIe") < CARDS["h100-80g"].flops
    for name in ("cpu", "NVIDIA A10", "NVIDIA A10G", "TPU v7"):
        assert peak_flops(name) is None, name


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    require_wandb(RunConfig().wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed") as caught:
        require_wandb("calibration")
    assert (caught.value.field, caught.value.value) == ("run.wandb", "calibration")
    assert "pip install 'csp_jax[wandb]'" in str(caught.value.mend)


def test_a_board_is_found_again(tmp_path, monkeypatch):
    """Offline: two sessions of one run, with what was logged in each."""
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        board = Board("calibration", tmp_path, {"seed": 3})
        board.log({"loss": 0.5}, step)
        board.close()
        time.sleep(1.1)  # sessions are named by the second
    name = (tmp_path / "wandb-id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    assert all(b"loss" in file.read_bytes() for file in files)
