"""How cost grows: the time of an update with what is said behind a prompt, its memory with that and the vocabulary."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from csp_jax.bench.clock import in_turns, program_bytes
from csp_jax.bench.made import made_ground
from csp_jax.bench.run import Settings, made_config
from csp_jax.config import TrainConfig
from csp_jax.data.batch import Batch, Branch, Packer, with_policy
from csp_jax.families.registry import open_family
from csp_jax.plan.program import step_program
from csp_jax.sharding import make_mesh
from csp_jax.train.loop import Run, batch_shape
from csp_jax.train.window import stack_batches

RESPONSES, TOKENS, VOCABULARY = (1, 2, 4, 8, 16, 32), (4, 16, 32), (8000, 16000, 32000, 64000, 128000)
WORDS = r"decoder\.(embed|head)"  # frozen where the vocabulary grows: their gradients are as large as they are


def growth_rows(
    model: str,
    settings: Settings,
    folder: Path,
    overrides: Sequence[str],
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of three series: more responses, longer responses, more words in the vocabulary.

    The first two run, each size once a turn; `fitted_seconds` is the line through all of them over the tokens behind
    the prompt. The third is compiled only, with word embeddings and head frozen.
    """
    checkpoint, shards = made_ground(model, settings.lengths, folder)
    config = made_config("grpo", checkpoint, shards, settings, overrides)
    sizes = {("responses", count, settings.tokens) for count in RESPONSES}
    sizes |= {("tokens", settings.samples, length) for length in TOKENS}
    ran = run_sizes(config, sorted(sizes), repeats, say)
    return ran + [vocabulary_row(config, checkpoint, folder, words) for words in VOCABULARY]


class _Size:
    """One size's turns: the same run, a window of its own."""

    def __init__(self, name: str, run: Run, step: Any, window: Batch):
        self.name, self.run, self.step, self.window = name, run, step, run.put(window)

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self.run.state, metrics = self.step(self.run.state, self.window)
        jax.block_until_ready((self.run.state, metrics))
        return {self.name: time.perf_counter() - start}


def run_sizes(
    config: TrainConfig, sizes: Sequence[tuple[str, int, int]], repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each (series, responses, tokens of each), timed in turns."""
    run = Run(config)
    step: Any = run.step_function()  # a jitted function, but for pmap
    windows = [window_of(run, responses, tokens) for _, responses, tokens in sizes]
    tasks = [_Size(str(number), run, step, window) for number, window in enumerate(windows)]
    in_turns(tasks, 2, lambda turn: say(f"warm-up {turn + 1} of 2"))
    seconds = in_turns(tasks, repeats, lambda turn: say(f"turn {turn + 1} of {repeats}"))
    medians = np.array([np.median(seconds[task.name]) for task in tasks])
    behind = np.array([responses * tokens for _, responses, tokens in sizes])
    slope, start = np.polyfit(behind, medians, 1)
    vocabulary = run.model().decoder.config.vocab_size
    rows = []
    for number, (series, responses, tokens) in enumerate(sizes):
        compiled = step.lower(run.state, tasks[number].window).compile()
        row = row_of(series, responses, tokens, vocabulary, compiled)
        times = {"seconds": medians[number], "best_seconds": seconds[str(number)].min()}
        times["fitted_seconds"] = start + slope * behind[number]
        rows.append({**row, **{name: float(value) for name, value in times.items()}})
    return rows


def window_of(run: Run, responses: int, tokens: int) -> Batch:
    """A full window: made prompts, random responses of equal length, random advantages."""
    config = run.config
    rollout = config.rollout.model_copy(update={"samples": responses, "max_tokens": tokens})
    cell = open_family(run.source_folder).cell
    shape = batch_shape(config.model_copy(update={"rollout": rollout}), run.rows, cell)
    generator = np.random.default_rng(0)
    drawn = next(iter(run.dataset(list)))
    batches = []
    for start in range(0, len(drawn), run.rows):
        packer = Packer(shape)
        for one in drawn[start : start + run.rows]:
            said = generator.integers(5, 600, (responses, tokens)).tolist()
            branches = tuple((Branch(tuple(words), (1.0,) * tokens),) for words in said)
            assert one.sample is not None, "made records have questions"
            packer.add(dataclasses.replace(one.sample, groups=branches), share_rows=False)
        batch = with_policy(packer.batch)
        batch.advantage[:] = generator.standard_normal(batch.advantage.shape)
        batch.response_weight[:] = 1
        batches.append(batch)
    return stack_batches(batches)


def vocabulary_row(config: TrainConfig, checkpoint: Path, folder: Path, words: int) -> dict[str, Any]:
    """What the step needs with so many words, by its compiler."""
    values = json.loads((checkpoint / "config.json").read_text())
    values.get("text_config", values)["vocab_size"] = words
    numbers = folder / f"{checkpoint.name}-{words}-words"
    numbers.mkdir(parents=True, exist_ok=True)
    (numbers / "config.json").write_text(json.dumps(values))
    model = config.model.model_copy(update={"freeze": (*config.model.freeze, WORDS)})
    program = step_program(config.model_copy(update={"model": model}), numbers, make_mesh(config.parallel))
    rollout = config.rollout
    row = row_of("vocabulary", rollout.samples, rollout.max_tokens, words, program.lower().compile())
    return {**row, "seconds": None, "best_seconds": None, "fitted_seconds": None}


def row_of(series: str, responses: int, tokens: int, vocabulary: int, compiled: Any) -> dict[str, Any]:
    """Sizes and memory; `temporary_bytes` is what a step needs beside parameters, moments and batch."""
    found = compiled.memory_analysis()
    return {
        "series": series,
        "responses": responses,
        "tokens": tokens,
        "behind_the_prompt": responses * tokens,
        "vocabulary": vocabulary,
        "temporary_bytes": None if found is None else int(found.temp_size_in_bytes),
        "program_bytes": program_bytes(compiled),
    }
