"""What the decoder is fed while texts are said token by token: what is read first, then one more token of each text.

Keys and values of a prompt are computed once a row, whatever continues it.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.models.attention import interval_mask, prompt_interval, split_groups, target_ancestors, tree_layout
from csp_jax.models.decoder import KeysValues, Tables
from csp_jax.models.interface import Start, VisionLanguageModel

Memory = tuple[KeysValues, KeysValues]  # of the prompts, and of what follows each


class Reader(Protocol):
    """Feeds a batch to a model; the texts of a row are its continuations, in order."""

    def begin(self) -> tuple[Float[Array, "batch *#texts width"], Memory]:
        """The hidden states that the first tokens are drawn from, and what is remembered."""

    def one_more(
        self, memory: Memory, tokens: Int[Array, "batch texts tokens"], number: Int[Array, ""], done: Bool[Array, "..."]
    ) -> tuple[Float[Array, "batch texts width"], Memory]:
        """The hidden states behind the `number`-th tokens, the newest; `done` texts need no more."""


@dataclasses.dataclass(frozen=True)
class PromptReader:
    """Every text continues its row's one prompt; each has a memory of its own behind the prompt's.

    `room`: tokens of a text that may be fed. `prefill_again`: see `rollout.Sampling`.
    """

    model: VisionLanguageModel
    batch: Batch
    prompt: Float[Array, "batch prompt width"]
    start: Start
    texts: int
    room: int
    prefill_again: bool

    def begin(self) -> tuple[Array, Memory]:
        nothing = jnp.zeros((len(self.prompt), 0), jnp.int32)
        last = self.start.last[:, None]
        hidden, of_prompt, _ = self._read(nothing, nothing, 1, last, self.start.length)
        room = (self.texts, self.room)
        own = jax.tree.map(lambda m: jnp.zeros((*m.shape[:2], *room, *m.shape[3:]), m.dtype), of_prompt)
        return hidden, (of_prompt, own)

    def one_more(self, memory: Memory, tokens: Array, number: Array, done: Array) -> tuple[Array, Memory]:
        place, start, model = number - 1, self.start, self.model
        length = start.length + place + 1
        if model.length_dependent and self.prefill_again:
            crossing = (model.regime(length) != model.regime(length - 1)) & ~jnp.all(done, axis=1)
            memory = jax.lax.cond(
                jnp.any(crossing), self._again, lambda memory, *_: memory, memory, tokens, crossing, length
            )
        elif model.length_of_prompt:
            length = start.length
        tables = model.rope((start.following + place)[:, None], length[:, None] if model.length_dependent else None)
        token = jax.lax.dynamic_index_in_dim(tokens, place, axis=2, keepdims=False)
        segment = self.batch.prompt_segment
        visible = interval_mask(*prompt_interval(segment, start.last[:, None]), segment.shape[1])[:, None]
        masks = visible, (jnp.arange(self.room) <= place)[None, None, None]
        new = _embed(self, token)[:, :, None]
        hidden, own = model.decoder.extend(new, tables, *memory, masks, place)
        return hidden[:, :, 0], (memory[0], own)

    def _again(self, memory: Memory, tokens: Array, crossing: Array, length: Array) -> Memory:
        """Both memories, read anew where a row's regime changes."""
        rows, size = self.batch.prompt_segment.shape
        fed = tokens[:, :, : self.room].reshape(rows, -1)
        before = size + jnp.arange(self.texts * self.room).reshape(1, self.texts, self.room) - 1
        parent = jnp.broadcast_to(before, (rows, self.texts, self.room)).at[:, :, 0].set(self.start.last[:, None])
        nowhere = parent[:, :, 0]  # nothing is read from there: only the memories are wanted
        _, *new = self._read(fed, parent.reshape(rows, -1), self.texts, nowhere, length)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(crossing.reshape(1, -1, *[1] * (old.ndim - 2)), new, old)

        return jax.tree.map(choose, tuple(new), memory)

    def _read(
        self, fed: Array, parent: Array, groups: int, target_parent: Array, length: Int[Array, " batch"]
    ) -> tuple[Array, KeysValues, KeysValues]:
        """Prompts and fed tokens in one pass, each row as of one length."""
        layout = tree_layout(self.batch.prompt_segment, parent, groups)
        positions = self.start.following[:, None] + layout.depth - 1

        def tables(positions: Array) -> Tables:
            lengths = jnp.broadcast_to(length[:, None], positions.shape[:2])
            return self.model.rope(positions, lengths if self.model.length_dependent else None)

        both = tables(self.start.prompt), tables(positions)
        return self.model.decoder.prefill(self.prompt, _embed(self, fed), layout, both, target_parent)


class TargetReader:
    """A text continues each target's parent in a batch's trees: the same prompt, and questions that are parts of trees.

    Texts of a group share its tree's memory. They are read under the rotary regime of the batch: whoever builds it
    sees to it that the texts do not grow out of that (see `HostFamily.regime`).
    """

    def __init__(self, model: VisionLanguageModel, batch: Batch, prompt: Float[Array, "batch prompt width"], room: int):
        self.model, self.batch, self.prompt = model, batch, prompt
        self.layout = tree_layout(batch.prompt_segment, batch.parent, batch.groups, model.attention)
        self.places = model.places(batch, self.layout)
        self.texts, self.length = batch.target_parent.shape[1] // batch.groups, batch.tokens.shape[1] // batch.groups
        self.room = room
        # The same for every token that is said, so outside the loop.
        self._following = self._at_targets(jnp.concatenate([model.positions(batch)[1], self.places.branch + 1], axis=1))
        self._lengths = self._lengths_at_targets()
        first, last = self._at_targets(self.layout.first), self._at_targets(self.layout.last)
        self._visible = split_groups(interval_mask(first, last, self.layout.size), batch.groups)
        self._ancestors = target_ancestors(self.layout, batch.target_parent)

    def begin(self) -> tuple[Array, Memory]:
        batch, model = self.batch, self.model
        tables = model.rope_tables(batch, self.layout, self.places)
        read = model.decoder.prefill(self.prompt, _embed(self, batch.tokens), self.layout, tables, batch.target_parent)
        hidden, of_prompt, own = read
        more = [(0, 0)] * 3 + [(0, self.texts * self.room)] + [(0, 0)] * 2
        return hidden, (of_prompt, jax.tree.map(lambda memory: jnp.pad(memory, more), own))

    def one_more(self, memory: Memory, tokens: Array, number: Array, done: Array) -> tuple[Array, Memory]:
        place, model = number - 1, self.model
        token = jax.lax.dynamic_index_in_dim(tokens, place, axis=2, keepdims=False)
        new = split_groups(_embed(self, token), self.batch.groups)
        tables = model.rope(self._following + place, self._lengths)
        at = self.length + place * self.texts
        hidden, own = model.decoder.extend(new, tables, *memory, self._masks(place), at)
        return hidden.reshape(*token.shape, -1), (memory[0], own)

    def _at_targets(self, values: Int[Array, "batch tokens"]) -> Int[Array, "batch targets"]:
        return jnp.take_along_axis(values, self.batch.target_parent, axis=1)

    def _lengths_at_targets(self) -> Array | None:
        of_prompt, of_branch = self.places.prompt_length, self.places.branch_length
        if of_prompt is None or of_branch is None:
            return None
        return self._at_targets(jnp.concatenate([of_prompt, of_branch], axis=1))

    def _masks(self, place: Array) -> tuple[Array, Array]:
        """Prompt keys up to where the tree hangs; ancestors in the tree, and what the text itself has said."""
        slot, text = jnp.arange(self.texts * self.room), jnp.arange(self.texts)
        said = (slot // self.texts <= place) & (slot % self.texts == text[:, None])
        said = jnp.broadcast_to(said, (*self._ancestors.shape[:3], slot.size))
        return self._visible, jnp.concatenate([self._ancestors, said], axis=-1)


def _embed(reader: PromptReader | TargetReader, tokens: Int[Array, "batch tokens"]) -> Float[Array, "..."]:
    return reader.model.decoder.embed(tokens).astype(reader.prompt.dtype)
