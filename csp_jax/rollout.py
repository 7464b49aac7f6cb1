"""The sampler: the prompt is read once, then all samples of all rows are said token by token in one compiled loop.

The keys and values of a prompt are computed once a row and shared by its samples; each sample adds its own. The loop
ends when every sample has stopped or has its tokens, without asking the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from csp_jax.data.batch import Batch, Packer, Picture, Sample, Shape
from csp_jax.data.buckets import bucket
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily
from csp_jax.losses.logprobs import head_logits
from csp_jax.models.interface import Start, VisionLanguageModel
from csp_jax.readers import Memory, PromptReader, Reader, TargetReader


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; each value is compiled in.

    `temperature` 0 says the likeliest token. `top_k` (0: all) keeps the likeliest tokens, `top_p` of what is left
    the likeliest whose probabilities sum to it or just more. A sample ends behind one of the tokens `stop`.

    `prefill_again` matters where rotary frequencies depend on the length, when a sequence grows into another regime:
    False keeps what was read before as it was read, which is how the originals generate; True reads prompt and sample
    again under the new regime, so that each token's log-probability is that of `score` for the sequence up to it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    prefill_again: bool = False

    def __post_init__(self) -> None:
        for field, good, mend in (
            ("max_tokens", self.max_tokens >= 1, "Use 1 or more"),
            ("temperature", self.temperature >= 0, "Use 0 (the likeliest token) or more"),
            ("top_k", self.top_k >= 0, "Use 0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "Use more than 0 and at most 1"),
        ):
            if not good:
                raise UserError("out of range", field=f"sampling.{field}", value=getattr(self, field), mend=mend)


@struct.dataclass
class Samples:
    """What was said. The token that ended a sample is its last one; what lies behind `length` is zeros.

    `log_probs` are those of the model itself (log-softmax of its logits, natural, what `losses.logprobs.score` gives),
    whatever the temperature; `drawn_log_probs` those of the distribution that the tokens were drawn from, after
    temperature, top-k and top-p (0 when greedy).
    """

    tokens: Int[Array, "batch samples tokens"]
    log_probs: Float[Array, "batch samples tokens"]
    drawn_log_probs: Float[Array, "batch samples tokens"]
    length: Int[Array, "batch samples"]
    stopped: Bool[Array, "batch samples"]  # by a token of `stop`, not by `max_tokens`

    @property
    def weight(self) -> Float[Array, "batch samples tokens"]:
        """1 for what was said, 0 for padding."""
        return (jnp.arange(self.tokens.shape[-1]) < self.length[..., None]).astype(jnp.float32)


# --- which token -----------------------------------------------------------------------------------------------------


def keep_top_k(logits: Float[Array, "... vocab"], count: int) -> Float[Array, "... vocab"]:
    """Logits below the `count`-th largest are -inf; of equals all stay."""
    least = jax.lax.top_k(logits, min(count, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "... vocab"], share: float) -> Float[Array, "... vocab"]:
    """A token stays if the likelier ones have less than `share` of the probability; of equals all stay."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    above = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(above < share, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def drawn_from(logits: Float[Array, "... vocab"], sampling: Sampling) -> Float[Array, "... vocab"]:
    """Logits of the distribution that tokens are drawn from (temperature above 0)."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    return keep_top_p(logits, sampling.top_p) if sampling.top_p < 1 else logits


def draw(
    logits: Float[Array, "batch samples vocab"],
    seeds: UInt32[Array, "batch samples"],
    number: Int[Array, ""],
    sampling: Sampling,
) -> tuple[Int[Array, "batch samples"], Float[Array, "batch samples"], Float[Array, "batch samples"]]:
    """Token `number` of every sample, its log-probability, and that under the distribution it was drawn from.

    The random key depends on the sample's seed and the token's number alone.
    """

    def picked(logits: Array, tokens: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]

    logits = jnp.broadcast_to(logits, (*seeds.shape, logits.shape[-1]))
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, picked(logits, tokens), jnp.zeros(seeds.shape)
    kept = drawn_from(logits, sampling)
    keys = jax.vmap(jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number)))(seeds)
    tokens = jax.vmap(jax.vmap(jax.random.categorical))(keys, kept).astype(jnp.int32)
    return tokens, picked(logits, tokens), picked(kept, tokens)


# --- the loop --------------------------------------------------------------------------------------------------------


@struct.dataclass
class _Said:
    """The loop's state: `number` tokens of each sample are there; the last of them is still to be fed."""

    number: Int[Array, ""]
    samples: Samples
    done: Bool[Array, "batch samples"]
    memory: Memory


def _add(said: _Said, logits: Array, seeds: Array, sampling: Sampling) -> _Said:
    """One more token of every sample that goes on."""
    tokens, *log_probs = draw(logits, seeds, said.number, sampling)
    goes_on = ~said.done
    samples = said.samples

    def put(values: Array, new: Array) -> Array:
        return values.at[:, :, said.number].set(jnp.where(goes_on, new, 0).astype(values.dtype))

    stopped = goes_on & jnp.isin(tokens, jnp.array(sampling.stop, jnp.int32))
    samples = Samples(
        tokens=put(samples.tokens, tokens),
        log_probs=put(samples.log_probs, log_probs[0]),
        drawn_log_probs=put(samples.drawn_log_probs, log_probs[1]),
        length=samples.length + goes_on,
        stopped=samples.stopped | stopped,
    )
    return _Said(said.number + 1, samples, said.done | stopped, said.memory)


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    prompt: Float[Array, "batch prompt width"],
    seeds: UInt32[Array, "batch samples"],
    sampling: Sampling,
    *,
    start: Start | None = None,
) -> Samples:
    """Continue every prompt of a batch, one a row, with as many samples as it has seeds; rows of padding say nothing.

    `prompt` comes from `embed_prompt`; `start` says where positions begin, the batch's own unless given. The lengths
    that rotary frequencies may depend on are those of generation (`VisionLanguageModel.length_of_prompt`).
    """
    count, most = seeds.shape[1], sampling.max_tokens
    reader = PromptReader(model, batch, prompt, start or model.start(batch), count, _room(most), sampling.prefill_again)
    padding = ~jnp.any(batch.prompt_segment > 0, axis=1)[:, None]
    return _say(reader, model, seeds, jnp.broadcast_to(padding, seeds.shape), sampling)


def continue_targets(
    model: VisionLanguageModel,
    batch: Batch,
    prompt: Float[Array, "batch prompt width"],
    seeds: UInt32[Array, "batch targets"],
    sampling: Sampling,
) -> Samples:
    """Continue the parent of every target of a batch, each with one text; targets without weight say nothing.

    The prompt is read once a row, and each tree of a batch once, however many texts begin in it.
    """
    reader = TargetReader(model, batch, prompt, _room(sampling.max_tokens))
    return _say(reader, model, seeds, batch.target_weight == 0, sampling)


def _room(most: int) -> int:
    """Tokens of a text that may be fed: the last one never is."""
    return max(most - 1, 1)


def _say(
    reader: Reader, model: VisionLanguageModel, seeds: Array, done: Bool[Array, "batch samples"], sampling: Sampling
) -> Samples:
    """The texts of a reader, token by token."""
    head = model.decoder.head_kernel()
    hidden, memory = reader.begin()
    shape = (*seeds.shape, sampling.max_tokens)
    samples = Samples(
        tokens=jnp.zeros(shape, jnp.int32),
        log_probs=jnp.zeros(shape),
        drawn_log_probs=jnp.zeros(shape),
        length=jnp.zeros(seeds.shape, jnp.int32),
        stopped=jnp.zeros(seeds.shape, bool),
    )
    said = _Said(jnp.zeros((), jnp.int32), samples, done, memory)
    said = _add(said, head_logits(hidden, head), seeds, sampling)

    def go_on(said: _Said) -> Array:
        return (said.number < sampling.max_tokens) & ~jnp.all(said.done)

    def feed(said: _Said) -> _Said:
        hidden, memory = reader.one_more(said.memory, said.samples.tokens, said.number, said.done)
        return _add(dataclasses.replace(said, memory=memory), head_logits(hidden, head), seeds, sampling)

    return jax.lax.while_loop(go_on, feed, said).samples


# --- from batches and pictures ---------------------------------------------------------------------------------------

Sampler = Callable[[Any, Batch, Any], Samples]


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "dtype"))
def sample_batch(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    dtype: jnp.dtype,
    state: nnx.State | tuple[nnx.State, ...],
    batch: Batch,
    seeds: UInt32[Array, "batch samples"],
) -> Samples:
    """Pictures, prompt and samples in one program; models of one structure and batches of one shape share it."""
    model = nnx.merge(graphdef, *(state if isinstance(state, tuple) else (state,)))
    prompt = model.embed_prompt(batch, model.clean_pixels(batch), dtype=dtype)
    return generate(model, batch, prompt, seeds, sampling)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "dtype"))
def continue_batch(
    graphdef: nnx.GraphDef, sampling: Sampling, dtype: jnp.dtype, state: nnx.State, batch: Batch
) -> Samples:
    """`continue_targets` from pictures on, in one program; every target's seed is 0."""
    model = nnx.merge(graphdef, state)
    prompt = model.embed_prompt(batch, model.clean_pixels(batch), dtype=dtype)
    return continue_targets(model, batch, prompt, jnp.zeros(batch.target_parent.shape, jnp.uint32), sampling)


def make_sampler(graphdef: nnx.GraphDef, sampling: Sampling, *, dtype: jnp.dtype = jnp.float32) -> Sampler:
    """`sampler(state, batch, seeds) -> Samples`: one prompt a row, a sample for each of its seeds [batch, samples].

    `state` is what `nnx.split` gave beside the graph (a tuple where it gave several), sharded or not; `dtype` that of
    the computation: softmax and logits are float32 always. What a sample says depends on its prompt and its seed, not
    on its place, its neighbours or the batch. ValueError: a batch on the host with several prompts in a row.
    """

    def sampler(state: Any, batch: Batch, seeds: Any) -> Samples:
        if isinstance(batch.prompt_segment, np.ndarray) and np.any(batch.prompt_segment > 1):
            raise ValueError("a row holds several prompts: pack them with share_rows=False")
        if not isinstance(seeds, jax.Array):
            seeds = np.asarray(seeds, np.uint32)
        return sample_batch(graphdef, sampling, jnp.dtype(dtype), state, batch, seeds)

    return sampler


def end_token(family: HostFamily) -> int:
    """The token that ends an answer."""
    found = family.tokenizer.token_to_id(family.end_of_answer)
    if found is None:
        mend = "config.json and the tokenizer's files must be of one checkpoint"
        raise UserError(
            "the tokenizer lacks the end mark", file=family.directory, value=family.end_of_answer, mend=mend
        )
    return found


def greedy_answer(
    model: VisionLanguageModel, family: HostFamily, picture: Picture, question: str, *, most: int = 32
) -> str:
    """What a model answers to a question about one picture: greedy text up to the end mark, at most `most` tokens."""
    prompt = family.encode(question, None, (family.image_tokens(picture.canvas),)).tokens
    cell = picture.cell or picture.canvas.shape[:2]
    packer = Packer(Shape(1, bucket(len(prompt)), 0, 0, 0, 0, 1, cell, picture.cells))
    packer.add(Sample(prompt, (picture,), ()))
    end = end_token(family)
    graphdef, state = nnx.split(model)
    sampler = make_sampler(graphdef, Sampling(most, temperature=0, stop=(end,)))
    samples = sampler(state, packer.batch, np.zeros((1, 1), np.uint32))
    said = np.asarray(samples.tokens)[0, 0, : int(samples.length[0, 0])].tolist()
    return family.tokenizer.decode([token for token in said if token != end]).strip()
