"""The batches of GRPO: questions are drawn, the policy answers each several times, the answers are rewarded.

    questions -> samples of the current policy -> rewards -> advantages -> reference -> a window for the one loop

A group whose rewards are all alike teaches nothing: more questions are asked in its place, for so many rounds at most.

Each host draws and rewards its own questions; the sampler runs on all devices together. Then every host knows all
groups, so that they choose the same ones, and trains on its part of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
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
from csp_jax.sharding import gather_bytes, own_rows, put_batch, rows_over_hosts
from csp_jax.train.loop import Batches, Run, batch_shape, from_data
from csp_jax.train.window import Window, stack_batches

Place = tuple[int, int]  # which draw of the run, and which of its questions over all hosts


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


def question_shape(config: TrainConfig, rows: int, cell: tuple[int, int]) -> Shape:
    """Rows of a question each, without answers: what the sampler is given."""
    return dataclasses.replace(batch_shape(config, rows, cell), groups=0, length=0, targets=0, responses=0)


def sampling_for(rollout: RolloutConfig, end: int) -> Sampling:
    """How the policy is sampled up to its end mark."""
    return Sampling(rollout.max_tokens, rollout.temperature, rollout.top_k, rollout.top_p, (end,))


def batches_for(config: TrainConfig) -> Batches:
    """What makes the windows of a configured training (`train`'s `batches`)."""
    return Rollouts if config.loss.name == "grpo" else from_data


def share_groups(places: Sequence[Place], hosts: int, most: int) -> list[list[int]]:
    """Which groups each host trains on, at most so many: those that it drew itself, whose pictures it holds, first."""
    shares: list[list[int]] = [[] for _ in range(hosts)]
    left: list[int] = []
    for number, (_, row) in enumerate(places):
        own = shares[row % hosts]
        (own if len(own) < most else left).append(number)
    for number in left:
        next(share for share in shares if len(share) < most).append(number)
    return shares


class Rollouts(Iterator[Window]):
    """The windows of a GRPO run. Each rollout serves for `updates` windows; the state between them holds its samples,
    for the policy that made them is gone by then.

    UserError: questions that are not there.
    """

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.rollout: RolloutConfig = run.config.rollout
        self.family = open_family(run.source_folder)
        self.end = end_token(self.family)
        self.dtype = jnp.dtype(run.config.model.dtype)
        self.hosts, self.wanted = jax.process_count(), run.rows * run.config.batch.accumulation
        self.rows = rows_over_hosts(self.rollout.rows or self.wanted * self.hosts, run.mesh, "rollout.rows")
        self._questions = iter(run.dataset(list))
        self._draws = 0
        self._drawn: dict[Place, Drawn] = {}  # what this host drew in a rollout
        self._groups: list[Group] = []
        self._used = self.rollout.updates
        self._window: Window | None = None
        self.sampling = sampling_for(self.rollout, self.end)
        self._sampler = make_sampler(run.graphdef, self.sampling, dtype=self.dtype)
        # The first step gives its buffers up: a policy that trains whole needs a copy of where it began.
        whole = run.config.loss.kl_beta > 0 and not has_adapter(run.state.trainable)
        self._start = jax.tree.map(jnp.copy, run.state.trainable) if whole else None

    # --- where the run is ---------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """The place among the questions; within a rollout also what was said. The same on every host."""
        done = self._used == self.rollout.updates
        groups = [] if done else [dataclasses.asdict(group) for group in self._groups]
        return {"questions": self._questions.get_state(), "draws": self._draws, "used": self._used, "groups": groups}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._questions.set_state(state["questions"])
        self._used, self._draws, self._window = state["used"], state["draws"], None
        self._groups = [_group(values) for values in state["groups"]]

    def __next__(self) -> Window:
        if self._used == self.rollout.updates:
            self._groups, counts, metrics = self._roll()
            self._window, self._used = Window(self._batch(self._groups), counts, metrics), 1
            return self._window
        self._used += 1
        if self._window is None:  # a run that goes on in the middle of a rollout
            self._window = Window(self._batch(self._groups), Counter())
        return Window(self._window.batch, Counter())

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def _roll(self) -> tuple[list[Group], Counter[str], dict[str, float]]:
        """Sample until every row has a group with spread, at most `rounds` times; the others fill what is left."""
        wanted, step, turn = self.wanted * self.hosts, int(self.run.state.step), 0
        differ: list[Group] = []
        alike: list[Group] = []
        parts: list[_Part] = []
        counts: Counter[str] = Counter()
        self._drawn.clear()
        while len(differ) < wanted and turn < self.rollout.rounds:
            found = self._ask(step, turn, next(self._questions))
            for part in found:
                counts.update(part.counts)
            for group in sorted((group for part in found for group in part.groups), key=lambda group: group.place):
                (differ if group.spread else alike).append(group)
            parts += [part for part in found if part.groups]
            self._draws, turn = self._draws + 1, turn + 1
        if not parts:
            mend = "Look at the shards' items: they need a truth (ask: confidence: a response that is right or wrong)"
            field, value = "data.recipe.categories", list(self.config.data.recipe.categories)
            raise UserError("no record has such a question", field=field, value=value, mend=mend)
        counts["groups_alike"] = len(alike)
        counts["groups_alike_kept"] = min(max(wanted - len(differ), 0), len(alike))
        counts["groups_left_over"] = max(len(differ) - wanted, 0)
        return (differ + alike)[:wanted], counts, {**_metrics(parts), "rounds": float(turn)}

    def _ask(self, step: int, turn: int, drawn: Sequence[Drawn]) -> list[_Part]:
        """Every sample of these questions, rewarded, and of those that the other hosts drew."""
        places = [(self._draws, row * self.hosts + jax.process_index()) for row in range(len(drawn))]
        self._drawn.update(zip(places, drawn))
        asked = [(place, item) for place, item in zip(places, drawn) if isinstance(item, Asked)]
        rows, waiting = self.rows, []
        # All hosts run the sampler as often as the one with the most questions.
        most = int(multihost_utils.process_allgather(np.array(len(asked))).max())
        for start in range(0, most, rows):
            part = asked[start : start + rows]
            waiting.append((part, self._sample(step, turn, [one for _, one in part])))
        answers: list[_Answers] = []
        for part, samples in waiting:
            answers += self._answers(part, own_rows(samples, rows))
        own = self._rewarded(answers, sum((item.counts for item in drawn), Counter()))
        return [own] if self.hosts == 1 else [pickle.loads(part) for part in gather_bytes(pickle.dumps(own))]

    def _sample(self, step: int, turn: int, asked: Sequence[Asked]) -> Samples:
        """The samples of up to `rows` questions of each host, on their way."""
        packer = Packer(question_shape(self.config, self.rows, self.family.cell))
        seeds = np.zeros((self.rows, self.rollout.samples), np.uint32)
        for row, one in enumerate(asked):
            packer.add(one.sample, share_rows=False)
            numbers = range(self.rollout.samples)
            seeds[row] = [sample_seed(self.config.seed, step, turn, one.item.id, number) for number in numbers]
        batch, placed = (put_batch(x, self.run.mesh, leading=0) for x in (packer.batch, seeds))
        return self._sampler((self.run.state.trainable, self.run.state.frozen), batch, placed)

    def _answers(self, asked: Sequence[tuple[Place, Asked]], samples: Samples) -> Iterator[_Answers]:
        """What was said, as words and as tokens."""
        for at, (place, one) in enumerate(asked):
            said, tokens, log_probs = [], [], []
            for number, length in enumerate(samples.length[at].tolist()):
                ids = samples.tokens[at, number, :length].tolist()
                ended = bool(samples.stopped[at, number])
                text = self.family.tokenizer.decode(ids[:-1] if ended else ids).strip()
                said.append(Said(one.item, text, ended, one.images))
                tokens.append(tuple(ids))
                log_probs.append(tuple(samples.log_probs[at, number, :length].tolist()))
            yield _Answers(place, said, tuple(tokens), tuple(log_probs))

    def _rewarded(self, answers: Sequence[_Answers], counts: Counter[str]) -> _Part:
        flat = [said for answer in answers for said in answer.said]
        if not flat:
            return _Part([], {}, [], counts)
        total, parts = weighted(REWARDS, self.rollout.rewards, flat)
        rewards = total.reshape(len(answers), -1)
        groups = [
            Group(answer.place, answer.tokens, answer.log_probs, tuple(map(float, these)))
            for answer, these in zip(answers, rewards, strict=True)
        ]
        means = {name: float(part.mean()) for name, part in parts.items()}
        return _Part(groups, means, [one.ended for one in flat], counts)

    # --- the window ---------------------------------------------------------------------------------------------------

    def _shape(self, said: int) -> Shape:
        """Rows of questions with answers of up to so many tokens."""
        shape = batch_shape(self.config, self.run.rows, self.family.cell)
        said = min(bucket(said), self.rollout.max_tokens)
        return dataclasses.replace(shape, length=max(said - 1, 1), targets=said)

    def _batch(self, groups: list[Group]) -> Batch:
        """This host's part of the groups as flat branches of their questions, with advantages and the reference's
        log-probabilities."""
        rewards = np.array([group.rewards for group in groups])
        advantages, spread = group_advantages(rewards, scale=self.config.loss.advantages)
        own = share_groups([group.place for group in groups], self.hosts, self.wanted)[jax.process_index()]
        shape = self._shape(max(len(tokens) for group in groups for tokens in group.tokens))
        batches = []
        for start in range(0, self.wanted, shape.rows):
            packer = Packer(shape)
            numbers = own[start : start + shape.rows]
            for number in numbers:
                branches = tuple((Branch(tokens, (1.0,) * len(tokens)),) for tokens in groups[number].tokens)
                packer.add(_with_groups(self._draw(groups[number].place), branches), share_rows=False)
            batch = with_policy(packer.batch)
            for at, number in enumerate(numbers):
                batch.advantage[at], batch.response_weight[at] = advantages[number], spread[number]
                for sample, log_probs in enumerate(groups[number].log_probs):
                    first = sample * shape.targets
                    batch.old_log_probs[at, first : first + len(log_probs)] = log_probs
            batches.append(batch)
        self._drawn.clear()
        return stack_batches([self._with_reference(batch) for batch in batches])

    def _draw(self, place: Place) -> Drawn:
        """What was drawn there; drawn again if by another host, or before this process began."""
        draw, row = place
        return self._drawn.get(place) or self.run.drawn(draw * self.wanted * self.hosts + row)

    def _with_reference(self, batch: Batch) -> Batch:
        if not self.config.loss.kl_beta:
            return dataclasses.replace(batch, reference_log_probs=None)
        state = self.run.state
        states = (state.trainable if self._start is None else self._start, state.frozen)
        plain = dataclasses.replace(
            batch, old_log_probs=None, reference_log_probs=None, advantage=None, response_weight=None
        )
        placed = put_batch(plain, self.run.mesh, leading=0)
        found = own_rows(reference_log_probs(self.run.graphdef, self.dtype, states, placed), self.run.rows)
        return dataclasses.replace(batch, reference_log_probs=np.where(batch.target_weight > 0, found, 0))


@dataclasses.dataclass(frozen=True)
class _Answers:
    """The samples of one question."""

    place: Place
    said: list[Said]
    tokens: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A host's part of a round: its groups, the mean of each reward, which samples ended by themselves, and what was
    counted while it drew."""

    groups: list[Group]
    means: dict[str, float]
    ended: list[bool]
    counts: Counter[str]


def _metrics(parts: Sequence[_Part]) -> dict[str, float]:
    """Of everything that was sampled, kept or not."""
    groups = [group for part in parts for group in part.groups]
    rewards = np.array([group.rewards for group in groups])
    shares = np.array([len(part.groups) for part in parts]) / len(groups)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1, ddof=1).mean()),  # within a group
        "zero_spread": float(np.mean([not group.spread for group in groups])),
        "response_tokens": float(np.mean([len(tokens) for group in groups for tokens in group.tokens])),
        "ended": float(np.mean([end for part in parts for end in part.ended])),
        **{f"reward_{name}": float(np.dot(shares, [part.means[name] for part in parts])) for name in parts[0].means},
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
