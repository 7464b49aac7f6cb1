"""`csp-prep bench`: how fast the stages are, and what the two modes and the two noise spaces cost."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from csp_jax.records import Item, encode_mask
from data_prep.config import PerturbConfig, PrepConfig
from data_prep.engine import Clocks, run_in_turn, run_stages
from data_prep.masks import Pixels
from data_prep.pack import Packer
from data_prep.perturb import PerturbStage, Schedule, bury, fit, iterate, jump
from data_prep.pictures import jpeg
from data_prep.run import batches, open_stages
from data_prep.sources.base import units
from data_prep.sources.registry import open_source
from data_prep.unit import Region, Unit

WIDTH, HEIGHT = 640, 480
STEPS = 500


def photograph(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture with the falling spectrum and the grain of photographs; as JPEG about as many bytes as COCO's."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(7):
        cells = 3 * 2**octave
        field = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(field.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 2**octave
    total -= total.min()
    grain = generator.normal(0, 9, (height, width, 1)).astype(np.float32)
    return np.clip(total * (255 / total.max()) + grain, 0, 255).astype(np.uint8)


def disc(width: int = WIDTH, height: int = HEIGHT, share: float = 0.15) -> np.ndarray:
    """A round mask that covers a share of the picture."""
    y, x = np.mgrid[:height, :width]
    return (x - width / 2) ** 2 + (y - height / 2) ** 2 < share * width * height / np.pi


def best_of(function: Callable[[], object], repeats: int) -> float:
    """The median of several timings in seconds, after one that is not counted."""
    function()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def noise_speed(repeats: int = 5) -> dict[str, Any]:
    """The closed form against 500 iterations, on all pixels of a picture of 640 x 480."""
    values = torch.from_numpy(photograph(0)).float() / 127.5 - 1
    schedule = Schedule(t_max=STEPS)
    generator = torch.Generator().manual_seed(0)
    gammas, alpha_bar = schedule.gammas(0), schedule.alpha_bar(0)
    slow = best_of(lambda: iterate(values, gammas, generator), repeats)
    fast = best_of(lambda: jump(values, alpha_bar, torch.empty_like(values).normal_(generator=generator)), repeats)
    return {"iterated, ms": slow * 1e3, "closed form, ms": fast * 1e3, "times faster": slow / fast}


def packing_speed(records: int = 400) -> dict[str, Any]:
    """Encoded pictures through the packer onto the disk, ledger, masks, checksums and syncs included."""
    pictures = [jpeg(photograph(seed), 90) for seed in range(8)]
    mask = Pixels(disc())
    made = [_unit(number, pictures[number % 8], mask) for number in range(records)]
    size = sum(len(unit.encoded) for unit in made)
    with tempfile.TemporaryDirectory() as folder:
        start, worked = time.perf_counter(), time.process_time()
        with Packer(Path(folder) / "out", "bench", {"train": 1.0}, 200, {}, {}) as packer:
            for unit in made:
                packer.add(unit)
            packer.finish()
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
    return {
        "records": records,
        "MB": size / 1e6,
        "kB a picture": size / records / 1e3,
        "MB/s": size / 1e6 / seconds,
        "MB/s of processor time": size / 1e6 / worked,
    }


def _unit(number: int, encoded: bytes, mask: Pixels) -> Unit:
    item = Item(f"q{number}", "Is there a disc in the image?", "yes", "disc", (0,), "yes", ("yes", "no"), 1)
    unit = Unit(number, f"r{number}", f"p{number}", None, 1, [item], {item.id: "bench"})
    unit.regions = [Region("disc", (100.0, 50.0, 540.0, 430.0), mask=mask)]
    unit.encoded, unit.picture = encoded, np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    return unit


def modes(pictures: int = 4) -> dict[str, Any]:
    """Bytes and seconds of the materialized mode (eleven labels, iterated) against the on-device mode, a question."""
    plain = 0.0
    noised, seconds = dict.fromkeys(("png", "jpeg"), 0), dict.fromkeys(("png", "jpeg"), 0.0)
    for seed in range(pictures):
        pixels, mask = photograph(seed), disc()
        for encoding in noised:
            unit = _unit(seed, jpeg(pixels, 90), Pixels(mask))
            unit.picture = pixels
            settings = PerturbConfig.model_validate({"mode": "materialized", "encoding": encoding})
            start = time.perf_counter()
            PerturbStage(settings, 0)([unit])
            seconds[encoding] += time.perf_counter() - start
            noised[encoding] += sum(len(item.perturbed_image) for item in unit.made)
        plain += len(unit.encoded) + encode_mask(mask).nbytes
    return {
        "on-device, kB a question": plain / pictures / 1e3,
        **{f"materialized as {name}, kB more": noised[name] / pictures / 1e3 for name in noised},
        **{f"materialized as {name}, times the bytes": (plain + noised[name]) / plain for name in noised},
        **{f"materialized as {name}, seconds more": seconds[name] / pictures for name in noised},
    }


def spaces(canvas: int = 336, percent: int = 50, schedule: Schedule | None = None) -> list[dict[str, Any]]:
    """How much of the noise that [A] lays on the original is left on the model's canvas, by the picture's short side.

    `noise left` is the deviation after the resize over that before it. `percent that it looks like` is the confidence
    whose noise, laid on the canvas, deviates as much from the mean (a schedule linear in alpha_bar).
    """
    schedule = schedule or Schedule("linear")
    settings = PerturbConfig().canvas.model_copy(update={"size": canvas})
    rows = []
    for side in (336, 480, 640, 960, 1440):
        grey = np.full((side, round(side * 4 / 3), 3), 128, np.uint8)
        full = np.ones(grey.shape[:2], bool)
        generator = torch.Generator().manual_seed(side)
        noised = bury(grey, full, percent, schedule, generator, "closed")
        shown = np.asarray(fit(Image.fromarray(noised), settings, Image.Resampling.BICUBIC), float)
        left = float(shown.std() / noised.astype(float).std())
        alike = [_canvas_deviation(schedule, level) for level in range(101)]
        nearest = int(np.argmin([abs(value - shown.std()) for value in alike]))
        rows.append({"short side": side, "noise left": left, "percent that it looks like": nearest})
    return rows


def _canvas_deviation(schedule: Schedule, percent: int) -> float:
    grey = np.full((96, 96, 3), 128, np.uint8)
    generator = torch.Generator().manual_seed(percent)
    return float(bury(grey, np.ones((96, 96), bool), percent, schedule, generator, "closed").astype(float).std())


def stage_speed(config: PrepConfig, limit: int) -> dict[str, Any]:
    """Units a second of every stage alone and of the pipeline, over the first rows of a configuration's source.

    The stages in turn come first, without a keyword cache; then the same batches through the threads and the packer.
    """
    config = config.model_copy(update={"keywords": config.keywords.model_copy(update={"cache": ""})})
    source = open_source(config)
    stages, _ = open_stages(config)

    def wanted() -> Iterator[list[Unit]]:
        return batches(units(source, group=config.pack.group, limit=limit), config.batch, lambda unit: False)

    next(run_in_turn(wanted(), stages, Clocks()))  # warm
    clocks = Clocks()
    alone, count = _pack_all(run_in_turn(wanted(), stages, clocks), config, clocks)
    rates = {f"{name}, units/s": clock.rate for name, clock in clocks.of.items()}
    slowest = clocks.slowest
    piped, _ = _pack_all(run_stages(wanted(), stages, queue_size=config.run.queue, clocks=Clocks()), config, Clocks())
    return {
        "units": count,
        **rates,
        "slowest stage": slowest,
        "one after another, units/s": count / alone,
        "pipeline, units/s": count / piped,
        "pipeline over slowest stage": count / piped / clocks[slowest].rate,
    }


def _pack_all(stream: Iterator[list[Unit]], config: PrepConfig, clocks: Clocks) -> tuple[float, int]:
    """Seconds for a whole stream into a data set that is thrown away, and the units in it."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with Packer(Path(folder) / "out", config.dataset, {"train": 1.0}, 500, {}, {}) as packer:
            for batch in stream:
                begun = time.perf_counter()
                for unit in batch:
                    packer.add(unit)
                clocks["pack"].seconds += time.perf_counter() - begun
                clocks["pack"].units += len(batch)
                count += len(batch)
            packer.finish()
        return time.perf_counter() - start, count


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that `csp-prep bench` prints."""

    noise: dict[str, Any]
    packing: dict[str, Any]
    modes: dict[str, Any]
    spaces: list[dict[str, Any]]
    stages: dict[str, Any] | None


def measure(config: PrepConfig | None, limit: int) -> Measured:
    """All measurements; those of the stages only for a configuration."""
    staged = stage_speed(config, limit) if config else None
    return Measured(noise_speed(), packing_speed(), modes(), spaces(), staged)
