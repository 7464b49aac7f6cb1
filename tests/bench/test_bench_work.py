"""What a batch asks for, against sequences written out and closed forms."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from bench_ground import PROMPT, SIZES, config, make_ground

from csp_jax.bench.work import forward_flops, hidden_pairs, micro_batches, sampler_flops, seen_tokens, step_flops
from csp_jax.bench.work import window_work as work_of
from csp_jax.data.batch import CHOSEN, REJECTED, Branch, Packer, Sample, Shape
from csp_jax.families.registry import open_family
from csp_jax.policy import Rollouts
from csp_jax.train.loop import Run


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("bench"))


def branch(*tokens: int, fed: int = 0, role: int = 1) -> Branch:
    """A response of which the first `fed` tokens are not scored."""
    return Branch(tokens, (0.0,) * fed + (1.0,) * (len(tokens) - fed), role)


PAIR = (branch(9, 8, 7, 6, fed=1, role=CHOSEN), branch(9, 8, 5, fed=1, role=REJECTED))  # they share 9 and 8


def filled() -> Packer:
    """Row 0: a prompt of five with a pair, and one of three with a response of two; row 1: a prompt of four, a pair."""
    packer = Packer(Shape(2, 10, 2, 4, 6, 4, 1, None))
    packer.add(Sample((1,) * 5, (), (PAIR,)))
    packer.add(Sample((1,) * 3, (), ((branch(4, 4),),)))
    packer.add(Sample((1,) * 4, (), (PAIR,)), share_rows=False)
    return packer


def test_tokens_and_samples_of_a_known_batch():
    work = work_of(filled().batch)
    # 9 and 8 are fed once for both, 7 for the first alone; what nothing follows is not fed
    assert work.tokens == (5 + 3) + (3 + 1) + (4 + 3)
    assert work.samples == 2 + 1 + 2
    assert work.sequence_tokens == (5 + 4) + (5 + 3) + (3 + 2) + (4 + 4) + (4 + 3)
    assert work.slots == 2 * (10 + 2 * 4)
    assert work.images == 0


def test_windows_are_their_micro_batches():
    from csp_jax.train.window import stack_batches

    batch = filled().batch
    one, window = work_of(batch), work_of(stack_batches([batch, batch, batch]))
    assert (window.tokens, window.samples, window.slots) == (3 * one.tokens, 3 * one.samples, 3 * one.slots)


def test_pairs_that_masks_forbid():
    """Each prompt is a triangle; a branch token sees its prompt and what leads to it."""
    batch = filled().batch
    triangles = 5 * 6 // 2 + 3 * 4 // 2 + 4 * 5 // 2
    fed = (6 + 7 + 8) + 4 + (5 + 6 + 7)
    assert seen_tokens(batch).sum() == triangles + fed
    computed = 2 * (10 * 10 + 8 * (10 + 4))
    # targets see what their parents see: 8, 7 and 6 behind 9, 8 and 7; 8 and 5 behind 9 and 8
    targets = (6 + 7 + 8 + 6 + 7) + (3 + 4) + (5 + 6 + 7 + 5 + 6)
    computed_last = 2 * 12 * (10 + 4)
    expected = 4 * (computed - triangles - fed) + computed_last - targets
    assert hidden_pairs(batch, layers=5) == expected


def vision_flops(patches: int) -> tuple[float, float]:
    """Of one picture: the patch projection, and everything behind it up to the decoder's width."""
    (layers, width, ffn, _), text = SIZES.tower, SIZES.decoder[1]
    tokens, used = patches + 1, layers - 1
    layer = 4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * ffn + 2 * 2 * tokens**2 * width
    return 2.0 * patches * 3 * SIZES.patch**2 * width, used * layer + 2.0 * patches * (width * text + text * text)


def decoder_flops(tokens: int, targets: int, pairs: float, pairs_of_targets: float) -> float:
    """Of one row; pairs of a query and a key that it sees, in each layer but the last and in the last."""
    layers, width, ffn, _ = SIZES.decoder
    below = 2.0 * tokens * (4 * width**2 + 3 * width * ffn) + 4.0 * pairs * width
    last = (
        2.0 * tokens * 2 * width**2 + 2.0 * targets * (2 * width**2 + 3 * width * ffn) + 4.0 * pairs_of_targets * width
    )
    return (layers - 1) * below + last + 2.0 * targets * width * SIZES.vocabulary


def test_flops_of_a_step(ground):
    """SFT on made records: no padding, so the closed form of prompt, question and answer in a row holds."""
    run = Run(config(ground, "sft"))
    window = next(iter(run.dataset())).batch
    rows = 8
    scored = int((window.target_weight > 0).sum()) // rows
    tokens = PROMPT + scored - 1
    work = work_of(window)
    assert (work.tokens, work.sequence_tokens, work.samples) == (rows * tokens, rows * (tokens + 1), rows)
    assert work.slots == work.tokens
    patch, tower = vision_flops((SIZES.pixels // SIZES.patch) ** 2)
    pairs = tokens * (tokens + 1) / 2
    of_targets = sum(range(PROMPT, tokens + 1))
    forward = tower + decoder_flops(tokens, scored, pairs, of_targets)
    # forward, and a product for each factor backward; pictures have no gradient
    assert step_flops(run, window) == pytest.approx(rows * (3 * forward + 2 * patch), rel=1e-9)
    batches = micro_batches(window)
    assert forward_flops(run.model(), batches, jnp.dtype("float32")) == pytest.approx(
        rows * (forward + patch), rel=1e-9
    )


def test_flops_of_sampling(ground):
    """The prompt once a row, then each sample token by token; its own memory has room for all that is fed."""
    run = Run(config(ground, "grpo"))
    rollouts = Rollouts(run)
    (batch,) = micro_batches(next(rollouts).batch)
    samples, said, rows = 3, 4, 8
    patch, tower = vision_flops((SIZES.pixels // SIZES.patch) ** 2)
    prompt = decoder_flops(PROMPT, 1, PROMPT * (PROMPT + 1) / 2, PROMPT)
    one = decoder_flops(1, 1, PROMPT + said - 1, PROMPT + said - 1)
    expected = rows * (patch + tower + prompt + samples * (said - 1) * one)
    assert sampler_flops(run, rollouts.sampling, batch, said) == pytest.approx(expected, rel=1e-9)


def test_an_answer_tree_is_a_hundred_and_one_sequences(ground):
    from csp_jax.bench.tasks import packed, prefill_and_distribution
    from csp_jax.data.shards import ShardSource

    family = open_family(ground / "checkpoint")
    alone, answered = prefill_and_distribution(family, ShardSource(ground / "records", "train"), 2)
    (before,), (after,) = packed(alone, 2), packed(answered, 2)
    query = work_of(before)
    assert query.samples == query.images == 2
    length = query.tokens // 2
    slots = (family.image_tokens(alone[0].pictures[0].canvas),)
    item = ShardSource(ground / "records", "train")[0].items[0]
    from csp_jax.text import Prompts

    asked = Prompts().ask_confidence(item.question, item.response)
    sequences = [len(family.encode(asked, f"{percent}%", slots).tokens) - 1 for percent in range(101)]
    assert min(sequences) > length
    assert work_of(after).sequence_tokens == 2 * sum(sequences)  # without the end mark
    assert np.isclose(work_of(after).tokens, 2 * (length + 1 + 10 + 90 + 1))  # a blank, digits; 10 and 0 again for 100
