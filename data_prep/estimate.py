"""`--dry-run`: a few units through all stages, and what the whole would cost."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

from csp_jax.records import encode
from data_prep.config import PrepConfig
from data_prep.engine import Clocks, run_in_turn
from data_prep.pack import make_record
from data_prep.run import batches, open_stages
from data_prep.sources.base import units
from data_prep.sources.registry import open_source

TRIED = 4  # batches; the first one warms up and is not counted


def estimate(config: PrepConfig) -> dict[str, Any]:
    """Rows and units, seconds of each stage, bytes written; extrapolated from the first batches. Nothing is written.

    The pipeline overlaps its stages, so that its time lies between the slowest stage's and the sum of all.
    """
    source = open_source(config)
    rows = total_units = 0
    for unit in units(source, group=config.pack.group, limit=config.limit):
        rows, total_units = rows + unit.rows, total_units + 1
    uncached = config.model_copy(update={"keywords": config.keywords.model_copy(update={"cache": ""})})
    stages, _ = open_stages(uncached)
    wanted = batches(units(source, group=config.pack.group, limit=config.limit), config.batch, lambda unit: False)
    clocks, warm = Clocks(), Clocks()
    tried = size = records = rejected = 0
    for number, batch in enumerate(itertools.islice(wanted, TRIED)):
        only_one = number == 0 and total_units <= config.batch
        for _ in run_in_turn(iter([batch]), stages, clocks if number or only_one else warm):
            for unit in batch:
                records += bool(unit.items)
                rejected += len(unit.rejects)
                size += len(encode(make_record(unit, config.dataset))) if unit.items else 0
        tried += len(batch)
    seconds = {name: clock.seconds / max(clock.units, 1) * total_units for name, clock in clocks.of.items()}
    slowest = max(seconds, key=lambda name: seconds[name], default="")
    return {
        "rows": rows,
        "units": total_units,
        "units tried": tried,
        "rejected of those tried": rejected,
        **{f"{name}, seconds": value for name, value in seconds.items()},
        "hours, at least (slowest stage)": seconds.get(slowest, 0.0) / 3600,
        "hours, at most (one after another)": sum(seconds.values()) / 3600,
        "gigabytes": size / max(tried, 1) * total_units / 1e9,
        "gigabytes free": shutil.disk_usage(_existing(Path(config.out).absolute())).free / 1e9,
    }


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    while not path.exists():
        path = path.parent
    return path
