"""What is timed: the loop's own step, a policy's rollout, the scoring pass, the evaluation pass."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from csp_jax.bench.clock import program_bytes
from csp_jax.bench.work import Work, forward_flops, micro_batches, sampler_flops, step_flops, window_work, windows_work
from csp_jax.calibration.protocols import EdgeTree, confidence_choice
from csp_jax.data.batch import Batch, Packer, Sample, Tree
from csp_jax.data.pictures import show
from csp_jax.data.recipes.base import Asker
from csp_jax.data.shards import ShardSource
from csp_jax.evaluate import PROTOCOLS, Scorer, evaluate, open_asking
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.policy import Rollouts
from csp_jax.scenes import SceneTrees, open_scenes, shape_of, shared_prompt
from csp_jax.text import Prompts
from csp_jax.train.loop import Run
from csp_jax.train.window import Window, Windows


class Task(Protocol):
    """One turn at a time: seconds of each part; what a part asks for is known after the first turn."""

    name: str

    def __call__(self) -> Mapping[str, float]: ...

    def work(self) -> Mapping[str, Work]: ...


class Updates:
    """A training as the loop runs it: the next window, onto the devices, one step. Of a policy, the window is sampled
    first: `NAME rollout` and `NAME update` are its halves."""

    def __init__(self, name: str, run: Run, windows: Windows):
        self.name, self.run, self.windows = name, run, windows
        self.step = run.step_function()
        self.window: Window | None = None

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self.window = next(self.windows)
        sampled = time.perf_counter()
        batch = self.run.put(self.window.batch)
        self.run.state, metrics = self.step(self.run.state, batch)
        jax.block_until_ready((self.run.state, metrics))
        end = time.perf_counter()
        if not isinstance(self.windows, Rollouts):
            return {self.name: end - start}
        halves = {f"{self.name} rollout": sampled - start, f"{self.name} update": end - sampled}
        return {self.name: end - start, **halves}

    def work(self) -> dict[str, Work]:
        assert self.window is not None, "nothing has run yet"
        flops = step_flops(self.run, self.window.batch)
        update = dataclasses.replace(window_work(self.window.batch), flops=flops, program_bytes=self._program_bytes())
        if not isinstance(self.windows, Rollouts):
            return {self.name: update}
        rollout = self._rollout(self.windows, self.window)
        whole = dataclasses.replace(update, flops=flops + (rollout.flops or 0.0))  # tokens: those that are trained on
        return {self.name: whole, f"{self.name} rollout": rollout, f"{self.name} update": update}

    def _program_bytes(self) -> int | None:
        """None where the step is not one program (pmap)."""
        if not hasattr(self.step, "lower"):
            return None
        assert self.window is not None
        return program_bytes(self.step.lower(self.run.state, self.run.put(self.window.batch)).compile())

    def _rollout(self, rollouts: Rollouts, window: Window) -> Work:
        """The samples of all rounds, and the reference's log-probabilities of those that are kept."""
        batches, rounds = micro_batches(window.batch), window.metrics["rounds"]
        said = window.metrics["response_tokens"]
        flops = rounds * sum(sampler_flops(self.run, rollouts.sampling, batch, said) for batch in batches)
        if self.run.config.loss.kl_beta:
            flops += forward_flops(self.run.model(), batches, rollouts.dtype)
        counted = window_work(window.batch)
        often = {name: round(getattr(counted, name) * rounds) for name in ("images", "samples")}
        return dataclasses.replace(counted, flops=flops, **often)


class Scores:
    """Batches of one shape through the scoring pass that evaluation uses, from host to log-probabilities."""

    def __init__(self, name: str, scorer: Scorer, model: VisionLanguageModel, batches: Sequence[Batch]):
        self.name, self.scorer, self.model, self.batches = name, scorer, model, batches

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        jax.block_until_ready([self.scorer(batch) for batch in self.batches])
        return {self.name: time.perf_counter() - start}

    def work(self) -> dict[str, Work]:
        counted = windows_work(self.batches)
        flops = forward_flops(self.model, self.batches, self.scorer.dtype)
        held = program_bytes(self.scorer.lower(self.batches[0]).compile())
        return {self.name: dataclasses.replace(counted, flops=flops, program_bytes=held)}


class Evaluation:
    """`csp eval`'s pass over one batch of records: pictures opened, questions as trees, asked, read."""

    def __init__(
        self, name: str, model: VisionLanguageModel, family: HostFamily, source: ShardSource, run: Run, protocol: str
    ):
        self.name, self.model, self.family, self.source, self.mesh = name, model, family, source, run.mesh
        self.rows, self.protocol = run.rows, PROTOCOLS[protocol]
        self._asking = open_asking(model, family, self._scenes(), run.mesh)

    def _scenes(self) -> list[SceneTrees]:
        return open_scenes(self.family, Prompts(), self.source, limit=self.rows, ask=self.protocol)

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        evaluate(self._asking, self._scenes(), rows=self.rows)
        return {self.name: time.perf_counter() - start}

    def work(self) -> dict[str, Work]:
        scenes = self._scenes()
        batches = packed([scene.sample for scene in scenes], self.rows)
        asked = sum(len(item.candidates) for scene in scenes for item in scene.items)
        flops = forward_flops(self.model, batches, jnp.dtype("float32"))
        return {self.name: dataclasses.replace(windows_work(batches), samples=asked, flops=flops)}


def packed(samples: Sequence[Sample], rows: int) -> list[Batch]:
    """Batches of one shape, one sample a row."""
    shape, batches = shape_of(samples, rows), []
    for start in range(0, len(samples), rows):
        packer = Packer(shape)
        for sample in samples[start : start + rows]:
            packer.add(sample, share_rows=False)
        batches.append(packer.batch)
    return batches


def prefill_and_distribution(family: HostFamily, source: ShardSource, count: int) -> tuple[list[Sample], list[Sample]]:
    """The confidence query about a picture: read up to where its answer begins; and with all 101 answers behind it."""
    alone, answered = [], []
    for number in range(count):
        record = source[number]
        item, picture = record.items[0], show(family, open_image(record.images[0], record.image_id))
        asker = Asker(family, Prompts(), picture)
        query = family.encode(Prompts().ask_confidence(item.question, item.response), None, asker.slots).tokens
        alone.append(Sample(query, (picture,), (Tree(targets=[(0, -1, 1.0, 0)]),)))
        prompt, tree = shared_prompt(asker), EdgeTree()
        confidence_choice(tree, asker, item.question, item.response, len(prompt))
        answered.append(Sample(prompt, (picture,), (tree.tree,)))
    return alone, answered
