"""What every family gives: features of images, and hidden states of a prompt and its branches."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.models.attention import Layout, segment_starts, tree_layout
from csp_jax.models.checkpoint_map import Tensor
from csp_jax.models.decoder import Decoder, Tables
from csp_jax.models.vision import CLIP_MEAN, CLIP_STD, standardize
from csp_jax.perturb import to_canvas

jax.tree_util.register_dataclass(
    Batch, data_fields=Batch.ARRAYS + Batch.EVALUATION + Batch.POLICY, meta_fields=Batch.STATIC
)


@struct.dataclass
class Places:
    """Positions of prompt and branch tokens, and the length of the sequence that each is part of.

    Positions have a last axis of 3 in families that place pictures in time, rows and columns. The lengths matter
    only to families whose rotary frequencies depend on them (`length_dependent`); None elsewhere.
    """

    prompt: Int[Array, "batch prompt *axes"]
    branch: Int[Array, "batch branch"]
    prompt_length: Int[Array, "batch prompt"] | None = None
    branch_length: Int[Array, "batch branch"] | None = None


@struct.dataclass
class Start:
    """Where what is said begins: the prompts' positions, and behind each prompt's last token the next position.

    `last`: index of that token. `length`: of the prompt, as families count it whose frequencies depend on it.
    """

    prompt: Int[Array, "batch prompt *axes"]
    last: Int[Array, " batch"]
    following: Int[Array, " batch"]
    length: Int[Array, " batch"]


class VisionLanguageModel(nnx.Module, abc.ABC):
    """A family's model. `image_token` marks the prompt slots that image features fill in reading order."""

    config_class: ClassVar[Any]  # the family's sizes: a dataclass with `from_hub(HubConfig)`
    config: Any  # an instance of it
    decoder: Decoder
    image_token: int
    unused: ClassVar[tuple[str, ...]] = ()  # parameter paths that the computation never reads
    aliases: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = ()  # other writers' names of the hub's tensors
    modules: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = ()  # hub names -> those of transformers' modules
    mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN  # of the vision tower's pixels in [0, 1], by colour
    std: ClassVar[tuple[float, float, float]] = CLIP_STD
    counts_padding: ClassVar[bool] = False  # the original's positions count padding on the left, too
    length_dependent: ClassVar[bool] = False
    # While tokens are generated, the length that counts for each is that of the sequence when it was fed; True: for all
    # of them that of the prompt.
    length_of_prompt: ClassVar[bool] = False
    attention: str = "xla"  # how: `xla`, or one of `models.attention`'s KERNELS and LIBRARIES
    repeated: tuple[str, ...] = ()  # keys of `duplicates` that the checkpoint had

    @staticmethod
    @abc.abstractmethod
    def tensors(config: Any) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""

    @staticmethod
    def duplicates(config: Any) -> dict[str, str]:
        """Hub keys that a checkpoint may have besides, and the keys whose tensors they repeat."""
        return {}

    def normalize(self, canvas: Float[Array, "... height width 3"]) -> Float[Array, "... height width 3"]:
        """Canvas in [-1, 1] -> the pixel values that the vision tower was trained on."""
        return standardize(canvas, self.mean, self.std)

    def pixels(
        self, batch: Batch, canvas: Float[Array, "batch cells height width 3"]
    ) -> Float[Array, "batch cells height width 3"]:
        """Pixel values of every view from a batch's canvas in [-1, 1], clean or noised."""
        return self.normalize(canvas)

    def clean_pixels(self, batch: Batch) -> Float[Array, "batch cells height width 3"] | None:
        """Pixel values of a batch's pictures as they are, without noise; None where it has none."""
        return None if batch.canvas is None else self.pixels(batch, to_canvas(batch.canvas))

    @abc.abstractmethod
    def encode_images(
        self,
        pixels: Float[Array, "batch cells height width 3"],
        grid: Int[Array, "batch pictures 2"] | None = None,
        remat: Callable | None = None,
    ) -> Float[Array, "batch features width"]:
        """Features of all images of a row; `grid` holds rows and columns of each picture's cells."""

    def feature_index(
        self, slot: Int[Array, "batch prompt"], grid: Int[Array, "batch pictures 2"] | None
    ) -> Int[Array, "batch prompt"]:
        """Which of `encode_images`' features fills the row's image slot of this number."""
        return slot

    @abc.abstractmethod
    def rope(
        self, positions: Int[Array, "batch tokens"], lengths: Array | None = None, *, train: bool = False
    ) -> Tables:
        """Rotary cosines and sines of positions; `lengths` are those of the tokens' sequences (see `Places`)."""

    def regime(self, lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """What a sequence's length chooses in the rotary frequencies, in evaluation (see `HostFamily.regime`)."""
        return jnp.zeros(lengths.shape)

    def hidden_states(
        self,
        batch: Batch,
        prompt: Float[Array, "batch prompt width"],
        *,
        places: Places | None = None,
        train: bool = False,
        remat: Callable | None = None,
    ) -> Float[Array, "batch targets width"]:
        """Normed hidden states from which each target is predicted; `prompt` comes from `embed_prompt`.

        `places` are the batch's own unless given; `train` chooses what a family does in training only.
        """
        layout = tree_layout(batch.prompt_segment, batch.parent, batch.groups, self.attention)
        branch = self.decoder.embed(batch.tokens).astype(prompt.dtype)
        tables = self.rope_tables(batch, layout, places, train=train)
        return self.decoder(prompt, branch, layout, tables, batch.target_parent, remat)

    def embed_prompt(
        self,
        batch: Batch,
        pixels: Float[Array, "batch cells height width 3"] | None,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: Callable | None = None,
    ) -> Float[Array, "batch prompt width"]:
        """Prompt embeddings with the image slots filled; `dtype` is that of the whole computation."""
        slot = self.slots(batch)
        prompt = self.decoder.embed(jnp.where(slot, 0, batch.prompt_tokens)).astype(dtype)
        if pixels is None:
            return prompt
        features = self.encode_images(pixels.astype(dtype), batch.grid, remat).astype(dtype)
        index = self.feature_index(jnp.maximum(jnp.cumsum(slot, axis=1) - 1, 0), batch.grid)
        index = jnp.clip(index, 0, features.shape[1] - 1)
        return jnp.where(slot[..., None], jnp.take_along_axis(features, index[..., None], axis=1), prompt)

    def slots(self, batch: Batch) -> Bool[Array, "batch prompt"]:
        """Which prompt tokens are filled by image features."""
        return (batch.prompt_tokens == self.image_token) & (batch.prompt_segment > 0)

    def positions(self, batch: Batch) -> tuple[Int[Array, "batch prompt *axes"], Int[Array, "batch prompt"]]:
        """Position of each prompt token within its segment, and the position of what follows it."""
        positions = segment_positions(batch.prompt_segment)
        return positions, positions + 1

    def start(self, batch: Batch) -> Start:
        """Where the continuations of a batch's prompts begin, one prompt a row, padded on either side."""
        positions, following = self.positions(batch)
        size = following.shape[1]
        last = size - 1 - jnp.argmax(batch.prompt_segment[:, ::-1] > 0, axis=1)
        next_position = jnp.take_along_axis(following, last[:, None], axis=1)[:, 0]
        return Start(positions, last, next_position, next_position)

    def places(self, batch: Batch, layout: Layout) -> Places:
        """Positions of a batch's tokens; they restart in each segment."""
        prompt, following = self.positions(batch)
        branch = jnp.take_along_axis(following, layout.root, axis=1) + layout.depth - 1
        lengths = sequence_lengths(batch, layout, following, branch) if self.length_dependent else (None, None)
        return Places(prompt, branch, *lengths)

    def rope_tables(
        self, batch: Batch, layout: Layout, places: Places | None = None, *, train: bool = False
    ) -> tuple[Tables, Tables]:
        """Rotary tables of prompt and branch tokens."""
        places = places or self.places(batch, layout)
        return (
            self.rope(places.prompt, places.prompt_length, train=train),
            self.rope(places.branch, places.branch_length, train=train),
        )


def segment_positions(segment: Int[Array, "batch prompt"]) -> Int[Array, "batch prompt"]:
    """Position of each prompt token within its segment (padding counts from its own start)."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    return index - segment_starts(segment)


def sequence_lengths(
    batch: Batch, layout: Layout, following: Int[Array, "batch prompt"], branch: Int[Array, "batch branch"]
) -> tuple[Int[Array, "batch prompt"], Int[Array, "batch branch"]]:
    """Per prompt and branch token the length of its item: of its prompt and its longest scored branch.

    One length for all that hangs from a prompt, because they share its keys. `following` and `branch` are positions.
    """
    size = following.shape[1]
    after = jnp.concatenate([following, branch + 1], axis=1)  # the position of a token that follows each
    root = jnp.concatenate([jnp.broadcast_to(jnp.arange(size), following.shape), layout.root], axis=1)
    ends = jnp.take_along_axis(after, batch.target_parent, axis=1) + 1
    ends = jnp.where(batch.target_weight != 0, ends, 0)
    target_root = jnp.take_along_axis(root, batch.target_parent, axis=1)

    def longest(segment: Array, following: Array, target_root: Array, ends: Array) -> Array:
        own = jax.ops.segment_max(following, segment, num_segments=size + 1)
        scored = jax.ops.segment_max(ends, segment[target_root], num_segments=size + 1)
        return jnp.maximum(own, scored)[segment]

    lengths = jax.vmap(longest)(batch.prompt_segment, following, target_root, ends)
    return lengths, jnp.take_along_axis(lengths, layout.root, axis=1)
