"""The machines that a plan can be made for: cards with their published figures, and how many of them.

A target is written `card:HOSTSxDEVICES` (`a100-80g:1x8`); of TPUs it is the slice's topology (`v5e:4x8`). A grid
alone is one of A100s with 80 GB.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import resources
from typing import Literal

from csp_jax.errors import UserError
from csp_jax.train import peaks

Platform = Literal["cuda", "tpu"]
DEFAULT_CARD = "a100-80g"


@dataclasses.dataclass(frozen=True)
class Card:
    """One device. Bandwidths are of one direction, in bytes a second; `flops` dense bfloat16 products a second.

    `link` joins devices of a host (of a TPU slice: a ring along one axis of the torus), `network` hosts, both a
    device. `fraction`: how much of the memory the allocator gives to a program, as launch/ sets it.
    """

    name: str
    platform: Platform
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    fraction: float
    grid_sizes: tuple[int, ...] = (2,)  # how many numbers a grid of them has

    @property
    def available(self) -> int:
        """Bytes that a program may use."""
        return int(self.memory * self.fraction)

    def compiler_description(self) -> str:
        """What the GPU compiler is told of the card."""
        return (resources.files("csp_jax.plan") / "cards" / f"{self.name}.txtpb").read_text()


# GPUs: NVIDIA's data sheets (SXM modules) and DGX systems: an InfiniBand adapter a GPU (200 Gb/s with A100, 400 Gb/s
# with H100). TPUs: the vendor's system architecture pages; a ring along one axis has two links.
CARDS = {
    card.name: card
    for card in (
        Card("a100-80g", "cuda", 85_100_068_864, peaks.A100, 2039e9, 300e9, 25e9, 0.92),
        Card("a100-40g", "cuda", 42_298_834_944, peaks.A100, 1555e9, 300e9, 25e9, 0.92),
        Card("h100-80g", "cuda", 84_929_347_584, peaks.H100, 3352e9, 450e9, 50e9, 0.92),
        Card("v5e", "tpu", 17_179_869_184, peaks.V5E, 819e9, 90e9, 6.25e9, 1.0),
        Card("v5p", "tpu", 102_005_473_280, peaks.V5P, 2765e9, 180e9, 6.25e9, 1.0, (3,)),
        Card("v6e", "tpu", 34_359_738_368, peaks.V6E, 1640e9, 180e9, 12.5e9, 1.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind: GPUs as hosts x devices a host, TPUs as a slice's grid."""

    card: Card
    grid: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.grid)

    @property
    def hosts(self) -> int:
        """Groups of devices joined by fast links: hosts of GPUs; a TPU slice is one."""
        return self.grid[0] if self.card.platform == "cuda" else 1

    @property
    def per_host(self) -> int:
        return self.devices // self.hosts

    @property
    def topology(self) -> str:
        """The grid as the compiler wants it."""
        shape = (1, *self.grid) if self.card.platform == "cuda" else self.grid
        return "x".join(map(str, shape))

    def __str__(self) -> str:
        return f"{self.card.name}:{'x'.join(map(str, self.grid))}"


def parse_target(text: str) -> Target:
    """`card:AxB` or `AxB`; UserError lists the cards."""
    name, _, shape = text.rpartition(":")
    name = name or DEFAULT_CARD
    known = ", ".join(CARDS)
    if name not in CARDS:
        raise UserError("no such card", field="--target", value=text, mend=f"Known: {known}; write a100-80g:1x8")
    card = CARDS[name]
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or len(sizes) not in card.grid_sizes:
        example = {
            "cuda": f"{name}:1x8 (hosts x devices of each)",
            "tpu": f"{name}:{'x'.join('4' * card.grid_sizes[0])}",
        }
        raise UserError("not a grid of devices", field="--target", value=text, mend=f"Write {example[card.platform]}")
    return Target(card, tuple(map(int, sizes)))
