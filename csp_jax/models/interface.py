"""What every family gives: features of images, and hidden states of a prompt and its branches."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from csp_jax.data.batch import Batch
from csp_jax.models.attention import Layout, tree_layout
from csp_jax.models.decoder import Decoder
from csp_jax.models.hub import Tensor

jax.tree_util.register_dataclass(Batch, data_fields=Batch.ARRAYS, meta_fields=Batch.STATIC)


class VisionLanguageModel(nnx.Module, abc.ABC):
    """A family's model. `image_token` marks the prompt slots that image features fill in reading order."""

    config_class: ClassVar[Any]  # the family's sizes: a dataclass with `from_hub(HubConfig)`
    config: Any  # an instance of it
    decoder: Decoder
    image_token: int
    unused: ClassVar[tuple[str, ...]] = ()  # parameter paths that the computation never reads

    @staticmethod
    @abc.abstractmethod
    def tensors(config: Any) -> list[Tensor]:
        """Every tensor of the hub layout and the leaf that it fills."""

    @abc.abstractmethod
    def normalize(self, canvas: Float[Array, "... height width 3"]) -> Float[Array, "... height width 3"]:
        """Canvas in [-1, 1] -> the pixel values that the vision tower was trained on."""

    @abc.abstractmethod
    def encode_images(
        self, pixels: Float[Array, "batch images height width 3"], remat: Callable | None = None
    ) -> Float[Array, "batch features width"]:
        """Features of all images of a row, in the order in which they fill the row's image slots."""

    @abc.abstractmethod
    def rope(self, positions: Int[Array, "batch tokens"]) -> tuple[Array, Array]:
        """Rotary cosines and sines of positions."""

    def hidden_states(
        self, batch: Batch, prompt: Float[Array, "batch prompt width"], *, remat: Callable | None = None
    ) -> Float[Array, "batch targets width"]:
        """Normed hidden states from which each target is predicted; `prompt` comes from `embed_prompt`."""
        layout = tree_layout(batch.prompt_segment, batch.parent, batch.groups)
        branch = self.decoder.embed(batch.tokens).astype(prompt.dtype)
        tables = self.rope_tables(batch, layout)
        return self.decoder(prompt, branch, layout, tables, batch.target_parent, remat)

    def embed_prompt(
        self,
        batch: Batch,
        pixels: Float[Array, "batch pictures height width 3"] | None,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: Callable | None = None,
    ) -> Float[Array, "batch prompt width"]:
        """Prompt embeddings with the image slots filled; `dtype` is that of the whole computation."""
        prompt = self.decoder.embed(batch.prompt_tokens).astype(dtype)
        if pixels is None:
            return prompt
        features = self.encode_images(pixels.astype(dtype), remat).astype(dtype)
        slot = batch.prompt_tokens == self.image_token
        index = jnp.clip(jnp.cumsum(slot, axis=1) - 1, 0, features.shape[1] - 1)
        return jnp.where(slot[..., None], jnp.take_along_axis(features, index[..., None], axis=1), prompt)

    def rope_tables(self, batch: Batch, layout: Layout) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Rotary tables of prompt and branch tokens; positions restart in each segment."""
        positions = segment_positions(batch.prompt_segment)
        branch = jnp.take_along_axis(positions, layout.root, axis=1) + layout.depth
        return self.rope(positions), self.rope(branch)


def segment_positions(segment: Int[Array, "batch prompt"]) -> Int[Array, "batch prompt"]:
    """Position of each prompt token within its segment (padding counts from its own start)."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    starts = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
