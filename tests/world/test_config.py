"""The shipped YAML is the default world; mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from csp_jax.world import WorldConfig
from csp_jax.world.catalogue import embedded_objects

ROOT = Path(__file__).parents[2]


def test_the_shipped_yaml_is_the_default():
    text = (ROOT / "configs" / "world" / "world.yaml").read_text()
    assert WorldConfig(**yaml.safe_load(text)) == WorldConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"canvass": 80}, "Extra inputs are not permitted"),
        ({"small": (17, 12)}, "least <= most"),
        ({"medium": (16, 25)}, "must not overlap"),
        ({"size_shares": (0.5, 0.5, 0.5)}, "must sum to 1"),
        ({"large": (26, 60)}, "half of the canvas"),
        ({"classes": "names.json"}, "set objects too"),
        ({"name": "My World"}, "name"),
        ({"contact": 1.5}, "contact"),
    ],
)
def test_mistakes_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        WorldConfig(**values)


def test_embedded_objects():
    classes = embedded_objects()
    assert len({item.name for item in classes}) == len(classes) == 60
    for item in classes:
        assert 1 <= len(item.name.split()) <= 2
        (cutout,) = item.train
        assert max(cutout.size) >= 60
