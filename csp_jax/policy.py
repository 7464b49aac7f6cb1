"""The batches of GRPO: questions are drawn, the policy answers each several times, the answers are rewarded.

    questions -> samples of the current policy -> rewards -> advantages -> reference -> a window for the one loop

A group whose rewards are all alike teaches nothing: more questions are asked in its place, for so many rounds at most.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from csp_jax.config import RolloutConfig, TrainConfig
from csp_jax.data.batch import Batch, Branch, Packer, Sample, Shape, with_policy
from csp_jax.data.buckets import bucket
from csp_jax.data.recipes.base import Drawn
from csp_jax.data.recipes.questions import Asked
from csp_jax.errors import UserError
from csp_jax.families.registry import open_family
from csp_jax.losses.grpo import SPREAD, group_advantages
from csp_jax.losses.logprobs import score
from csp_jax.models.lora import adapter_off, has_adapter
from csp_jax.rewards import REWARDS
from csp_jax.rewards.interface import Said, weighted
from csp_jax.rollout import Samples, Sampling, end_token, make_sampler
from csp_jax.sharding import put_batch
from csp_jax.train.loop import Batches, Run, batch_shape, from_data
from csp_jax.train.window import Window, stack_batches

Place = tuple[int, int]  # which draw of a rollout, and which of its questions


@dataclasses.dataclass(frozen=True)
class Group:
    """What was said to one question, without the padding."""

    place: Place
    tokens: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    rewards: tuple[float, ...]

    @property
    def spread(self) -> bool:
        """Whether the rewards differ."""
        return bool(np.ptp(self.rewards) > SPREAD)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def reference_log_probs(
    graphdef: nnx.GraphDef, dtype: jnp.dtype, states: tuple[nnx.State, nnx.State], batch: Batch
) -> Float[Array, "batch targets"]:
    """Log-probabilities of a batch's targets under the base: the model of `states` without its adapter, if any."""
    model = adapter_off(nnx.merge(graphdef, *states))
    return score(model, batch, model.clean_pixels(batch), dtype=dtype, train=True).log_probs


def sample_seed(seed: int, step: int, turn: int, item: str, number: int) -> int:
    """The seed of a sample: it depends on what is given here and on nothing else."""
    return zlib.crc32(json.dumps([seed, step, turn, item, number]).encode())


def batches_for(config: TrainConfig) -> Batches:
    """What makes the windows of a configured training (`train`'s `batches`)."""
    return Rollouts if config.loss.name == "grpo" else from_data


class Rollouts(Iterator[Window]):
    """The windows of a GRPO run. Each rollout serves for `updates` windows; the state between them holds its samples,
    for the policy that made them is gone by then.

    UserError: several processes, or questions that are not there.
    """

    def __init__(self, run: Run):
        if jax.process_count() > 1:
            mend = "Start one process; it uses all its devices"
            raise UserError("one process samples", field="loss.name", value="grpo", mend=mend)
        self.run, self.config = run, run.config
        self.rollout: RolloutConfig = run.config.rollout
        self.family = open_family(run.source_folder)
        self.end = end_token(self.family)
        self.dtype = jnp.dtype(run.config.model.dtype)
        self._questions = iter(run.dataset(list))
        self._before: Any = copy.deepcopy(self._questions.get_state())
        self._groups: list[Group] = []
        self._draws = 0  # of questions that the groups are from
        self._used = self.rollout.updates
        self._window: Window | None = None
        how = self.rollout
        self.sampling = Sampling(how.max_tokens, how.temperature, how.top_k, how.top_p, (self.end,))
        self._sampler = make_sampler(run.graphdef, self.sampling, dtype=self.dtype)
        # The first step gives its buffers up: a policy that trains whole needs a copy of where it began.
        whole = run.config.loss.kl_beta > 0 and not has_adapter(run.state.trainable)
        self._start = jax.tree.map(jnp.copy, run.state.trainable) if whole else None

    # --- where the run is ---------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """The place among the questions; within a rollout also what was said."""
        if self._used == self.rollout.updates:
            return {"questions": self._questions.get_state(), "draws": 0, "used": self._used, "groups": []}
        groups = [dataclasses.asdict(group) for group in self._groups]
        return {"questions": self._before, "draws": self._draws, "used": self._used, "groups": groups}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._questions.set_state(state["questions"])
        self._used, self._draws, self._window = state["used"], state["draws"], None
        self._groups = [_group(values) for values in state["groups"]]

    def __next__(self) -> Window:
        if self._used == self.rollout.updates:
            self._before = copy.deepcopy(self._questions.get_state())
            self._groups, drawn, counts, metrics = self._roll()
            self._window, self._used = Window(self._batch(self._groups, drawn), counts, metrics), 1
            return self._window
        self._used += 1
        if self._window is None:  # a run that goes on in the middle of a rollout draws its questions again
            self._before = copy.deepcopy(self._questions.get_state())
            drawn = [next(self._questions) for _ in range(self._draws)]
            self._window = Window(self._batch(self._groups, drawn), Counter())
        return Window(self._window.batch, Counter())

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def _roll(self) -> tuple[list[Group], list[list[Drawn]], Counter[str], dict[str, float]]:
        """Sample until every row has a group with spread, at most `rounds` times; the others fill what is left."""
        wanted = self.run.rows * self.config.batch.accumulation
        step = int(self.run.state.step)
        differ: list[Group] = []
        alike: list[Group] = []
        rounds: list[_Round] = []
        drawn: list[list[Drawn]] = []
        counts: Counter[str] = Counter()
        while len(differ) < wanted and len(drawn) < self.rollout.rounds:
            drawn.append(next(self._questions))
            for item in drawn[-1]:
                counts.update(item.counts)
            asked = [(row, item) for row, item in enumerate(drawn[-1]) if isinstance(item, Asked)]
            if asked:
                rounds.append(self._ask(step, len(drawn) - 1, asked))
                for group in rounds[-1].groups:
                    (differ if group.spread else alike).append(group)
        if not rounds:
            mend = "Look at the shards' items: they need a truth (ask: confidence: a response that is right or wrong)"
            field, value = "data.recipe.categories", list(self.config.data.recipe.categories)
            raise UserError("no record has such a question", field=field, value=value, mend=mend)
        self._draws = len(drawn)
        counts["groups_alike"] = len(alike)
        counts["groups_alike_kept"] = min(max(wanted - len(differ), 0), len(alike))
        counts["groups_left_over"] = max(len(differ) - wanted, 0)
        return (differ + alike)[:wanted], drawn, counts, _metrics(rounds)

    def _ask(self, step: int, turn: int, asked: Sequence[tuple[int, Asked]]) -> _Round:
        """Every sample of these questions, rewarded."""
        rows, waiting = self.run.rows, []
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            packer = Packer(self._shape(0))
            seeds = np.zeros((rows, self.rollout.samples), np.uint32)
            for row, (_, one) in enumerate(part):
                packer.add(one.sample, share_rows=False)
                numbers = range(self.rollout.samples)
                seeds[row] = [sample_seed(self.config.seed, step, turn, one.item.id, number) for number in numbers]
            batch, placed = (put_batch(x, self.run.mesh, leading=0) for x in (packer.batch, seeds))
            state = self.run.state
            waiting.append((part, self._sampler((state.trainable, state.frozen), batch, placed)))
        answers: list[_Answers] = []
        for part, samples in waiting:
            answers += self._answers(part, jax.device_get(samples))
        flat = [said for answer in answers for said in answer.said]
        total, parts = weighted(REWARDS, self.rollout.rewards, flat)
        rewards = total.reshape(len(answers), -1)
        groups = [
            Group((turn, answer.row), answer.tokens, answer.log_probs, tuple(map(float, these)))
            for answer, these in zip(answers, rewards, strict=True)
        ]
        return _Round(groups, {name: float(part.mean()) for name, part in parts.items()}, [one.ended for one in flat])

    def _answers(self, asked: Sequence[tuple[int, Asked]], samples: Samples) -> Iterator[_Answers]:
        """What was said, as words and as tokens."""
        for place, (row, one) in enumerate(asked):
            said, tokens, log_probs = [], [], []
            for number, length in enumerate(samples.length[place].tolist()):
                ids = samples.tokens[place, number, :length].tolist()
                ended = bool(samples.stopped[place, number])
                text = self.family.tokenizer.decode(ids[:-1] if ended else ids).strip()
                said.append(Said(one.item, text, ended, one.images))
                tokens.append(tuple(ids))
                log_probs.append(tuple(samples.log_probs[place, number, :length].tolist()))
            yield _Answers(row, said, tuple(tokens), tuple(log_probs))

    # --- the window ---------------------------------------------------------------------------------------------------

    def _shape(self, said: int) -> Shape:
        """Rows of questions alone, or with answers of up to so many tokens."""
        shape = batch_shape(self.config, self.run.rows, self.family.cell)
        if not said:
            return dataclasses.replace(shape, groups=0, length=0, targets=0, responses=0)
        said = min(bucket(said), self.rollout.max_tokens)
        return dataclasses.replace(shape, length=max(said - 1, 1), targets=said)

    def _batch(self, groups: list[Group], drawn: list[list[Drawn]]) -> Batch:
        """Groups as flat branches of their questions, with advantages and the reference's log-probabilities."""
        rewards = np.array([group.rewards for group in groups])
        advantages, spread = group_advantages(rewards, scale=self.config.loss.advantages)
        shape = self._shape(max(len(tokens) for group in groups for tokens in group.tokens))
        batches = []
        for start in range(0, shape.rows * self.config.batch.accumulation, shape.rows):
            packer = Packer(shape)
            rows = range(start, min(start + shape.rows, len(groups)))
            for row in rows:
                draw, place = groups[row].place
                branches = tuple((Branch(tokens, (1.0,) * len(tokens)),) for tokens in groups[row].tokens)
                packer.add(_with_groups(drawn[draw][place], branches), share_rows=False)
            batch = with_policy(packer.batch)
            for row in rows:
                at = row - start
                batch.advantage[at], batch.response_weight[at] = advantages[row], spread[row]
                for number, log_probs in enumerate(groups[row].log_probs):
                    first = number * shape.targets
                    batch.old_log_probs[at, first : first + len(log_probs)] = log_probs
            batches.append(batch)
        return stack_batches([self._with_reference(batch) for batch in batches])

    def _with_reference(self, batch: Batch) -> Batch:
        if not self.config.loss.kl_beta:
            return dataclasses.replace(batch, reference_log_probs=None)
        state = self.run.state
        states = (state.trainable if self._start is None else self._start, state.frozen)
        plain = dataclasses.replace(
            batch, old_log_probs=None, reference_log_probs=None, advantage=None, response_weight=None
        )
        placed = put_batch(plain, self.run.mesh, leading=0)
        found = jax.device_get(reference_log_probs(self.run.graphdef, self.dtype, states, placed))
        return dataclasses.replace(batch, reference_log_probs=np.where(batch.target_weight > 0, found, 0))


@dataclasses.dataclass(frozen=True)
class _Answers:
    """The samples of one question."""

    row: int
    said: list[Said]
    tokens: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Round:
    """The groups of one round, the mean of each reward, and which samples ended by themselves."""

    groups: list[Group]
    parts: dict[str, float]
    ended: list[bool]


def _metrics(rounds: Sequence[_Round]) -> dict[str, float]:
    """Of everything that was sampled, kept or not."""
    groups = [group for one in rounds for group in one.groups]
    rewards = np.array([group.rewards for group in groups])
    shares = np.array([len(one.groups) for one in rounds]) / len(groups)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1, ddof=1).mean()),  # within a group
        "zero_spread": float(np.mean([not group.spread for group in groups])),
        "response_tokens": float(np.mean([len(tokens) for group in groups for tokens in group.tokens])),
        "ended": float(np.mean([end for one in rounds for end in one.ended])),
        "rounds": float(len(rounds)),
        **{f"reward_{name}": float(np.dot(shares, [one.parts[name] for one in rounds])) for name in rounds[0].parts},
    }


def _with_groups(asked: Drawn, branches: tuple[tuple[Branch, ...], ...]) -> Sample:
    if asked.sample is None:
        raise ValueError("the data is not what it was: a question is gone")
    return dataclasses.replace(asked.sample, groups=branches)


def _group(values: dict[str, Any]) -> Group:
    """A group from a checkpoint's JSON."""
    draw, row = values["place"]
    tokens, log_probs = (tuple(map(tuple, values[name])) for name in ("tokens", "log_probs"))
    return Group((draw, row), tokens, log_probs, tuple(values["rewards"]))
