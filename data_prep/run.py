"""`csp-prep run`: the stages of a configuration put together, run to the end, taken up again."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csp_jax.config import read_yaml
from csp_jax.records import SCHEMA_VERSION
from csp_jax.text import Prompts
from data_prep.config import LocalizeConfig, PrepConfig, SegmentConfig
from data_prep.engine import Clocks, Engine, LocalEngine
from data_prep.hashes import hash_of
from data_prep.keywords.registry import open_finder
from data_prep.keywords.stage import KeywordStage
from data_prep.localize.interface import Detector
from data_prep.localize.stage import LocalizeStage
from data_prep.pack import Done, Packer, finished_totals, remove_dataset
from data_prep.pictures import DecodeStage
from data_prep.segment.interface import Segmenter
from data_prep.segment.stage import SegmentStage
from data_prep.sources.base import Source, units
from data_prep.sources.registry import open_source
from data_prep.unit import Stage, Unit

Progress = Callable[[int, Counter[str]], None]  # rows that are through, totals so far


@dataclass
class Prepared:
    """A finished run."""

    directory: Path
    totals: Counter[str]
    clocks: Clocks
    resumed: int  # records that an earlier, interrupted run had left
    repeated: bool = False  # nothing was to be done


def open_stages(config: PrepConfig) -> tuple[list[Stage], dict[str, Any]]:
    """The stages in order, and the hashes of the weights that they run."""
    prompts = Prompts.from_mapping(read_yaml(Path(config.prompts))) if config.prompts else Prompts()
    finder, weights = open_finder(config.keywords, prompts)
    detector, more = open_detector(config.localize)
    weights |= more
    segmenter, more = open_segmenter(config.segment)
    weights |= more
    stages: list[Stage] = [
        DecodeStage(config.images, config.run.threads),
        KeywordStage(config.keywords, finder),
        LocalizeStage(config.localize, detector, config.batch),
        SegmentStage(config.segment, segmenter, config.localize.several),
    ]
    if config.perturb.mode == "materialized":
        from data_prep.perturb import PerturbStage

        stages.append(PerturbStage(config.perturb, config.seed))
    return stages, weights


def open_detector(config: LocalizeConfig) -> tuple[Detector | None, dict[str, str]]:
    """The detector (None: the source's own regions) and the hash of its weights."""
    if config.detector.name == "annotations":
        return None, {}
    from data_prep.localize.grounding_dino import ZeroShotDetector

    detector = ZeroShotDetector(config.detector)
    return detector, {"localize": detector.weights}


def open_segmenter(config: SegmentConfig) -> tuple[Segmenter | None, dict[str, str]]:
    """The segmenter (None: boxes) and the hash of its weights."""
    model: Any = config.model
    segmenter: Any
    if model.name == "boxes":
        return None, {}
    if model.name == "grabcut":
        from data_prep.segment.grabcut import GrabCut

        segmenter = GrabCut(model)
    elif model.name == "segment-anything":
        from data_prep.segment.sam_anything import SegmentAnything

        segmenter = SegmentAnything(model)
    else:
        from data_prep.segment.sam_transformers import SamByTransformers

        segmenter = SamByTransformers(model)
    return segmenter, {"segment": segmenter.weights}


def identity_of(config: PrepConfig, source: Source, weights: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be taken up again: settings, source files, weights, schema."""
    return {
        "settings": hash_of(config.content()),
        "source": hash_of(source.fingerprint()),
        "weights": weights,
        "schema": SCHEMA_VERSION,
    }


def batches(stream: Iterator[Unit], size: int, is_done: Callable[[Unit], bool]) -> Iterator[list[Unit]]:
    """Units in batches that depend on the source alone, so that a resumed run computes in the same batches.

    A batch whose units are all done is left out; one that is partly done is made again as a whole.
    """
    while batch := list(itertools.islice(stream, size)):
        if not all(is_done(unit) for unit in batch):
            yield batch


@dataclass(frozen=True)
class Wanted:
    """The batches that are to be done, as often as one goes through them, here or in another process."""

    source: Source
    group: bool
    limit: int
    size: int
    done: Done

    def __iter__(self) -> Iterator[list[Unit]]:
        return batches(units(self.source, group=self.group, limit=self.limit), self.size, self.done)


def prepare(config: PrepConfig, *, overwrite: bool = False, progress: Progress | None = None) -> Prepared:
    """Make the data set that a configuration describes, or go on making it.

    Bad rows end in `rejects.jsonl`; UserError only for what ends the whole run (it can be resumed).
    """
    source = open_source(config)
    engine = open_engine(config)
    try:
        return _prepare(config, source, engine, overwrite, progress)
    finally:
        engine.close()


def open_engine(config: PrepConfig) -> Engine:
    """This process, or ray's workers."""
    if config.run.engine == "ray":
        from data_prep.ray_engine import RayEngine

        return RayEngine(config)
    stages, weights = open_stages(config)
    return LocalEngine(stages, weights, config.run.queue)


def _prepare(
    config: PrepConfig, source: Source, engine: Engine, overwrite: bool, progress: Progress | None
) -> Prepared:
    directory = Path(config.out)
    identity = identity_of(config, source, engine.weights)
    if overwrite:
        remove_dataset(directory, config.dataset)
    clocks = Clocks()
    done = finished_totals(directory, identity)
    if done is not None:
        return Prepared(directory, done, clocks, done["records"], repeated=True)
    settings = config.content()
    with Packer(
        directory, config.dataset, config.pack.splits, config.pack.records_per_shard, identity, settings
    ) as packer:
        wanted = Wanted(source, config.pack.group, config.limit, config.batch, packer.done)
        resumed = packer.resumed
        if progress:
            progress(packer.ledger.totals["rows"], packer.ledger.totals)
        for batch in engine.run(wanted, clocks):
            pack_batch(packer, batch, clocks)
            if progress:
                progress(packer.ledger.totals["rows"], packer.ledger.totals)
        return Prepared(directory, packer.finish(), clocks, resumed)


def pack_batch(packer: Packer, batch: list[Unit], clocks: Clocks) -> None:
    """Pack what is not safe already."""
    start = time.perf_counter()
    for unit in batch:
        if not packer.done(unit):
            packer.add(unit)
    clocks["pack"].seconds += time.perf_counter() - start
    clocks["pack"].units += len(batch)
