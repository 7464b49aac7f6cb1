"""Targets as they are written on the command line; mistakes are named."""

from __future__ import annotations

import pytest

from csp_jax.errors import UserError
from csp_jax.plan.targets import CARDS, parse_target


@pytest.mark.parametrize(
    ("text", "name", "devices", "hosts", "topology"),
    [
        ("a100-80g:1x8", "a100-80g:1x8", 8, 1, "1x1x8"),
        ("8x8", "a100-80g:8x8", 64, 8, "1x8x8"),
        ("h100-80g:32x8", "h100-80g:32x8", 256, 32, "1x32x8"),
        ("v5e:4x8", "v5e:4x8", 32, 1, "4x8"),
        ("v5p:2x2x4", "v5p:2x2x4", 16, 1, "2x2x4"),
    ],
)
def test_targets(text, name, devices, hosts, topology):
    target = parse_target(text)
    assert str(target) == name
    assert (target.devices, target.hosts, target.per_host, target.topology) == (
        devices, hosts, devices // hosts, topology,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["a100:1x8", "a100-80g", "a100-80g:8", "a100-80g:0x8", "v5e:2x2x2", "v5p:4x4", "x"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert (caught.value.field, caught.value.value) == ("--target", text)
    assert caught.value.mend


def test_every_gpu_has_its_description():
    for card in CARDS.values():
        if card.platform == "cuda":
            assert f"device_memory_size: {card.memory}" in card.compiler_description()
            assert 0.9 * card.memory < card.available < card.memory
