"""What a world's base starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

import csp_jax.world
from csp_jax.errors import UserError
from csp_jax.world.config import WorldConfig
from csp_jax.world.untrained import base_config, write_untrained

SHIPPED = Path(csp_jax.world.__file__).parent / "base"


def test_the_shipped_base_started_from_the_embedded_world(tmp_path):
    write_untrained(WorldConfig(), tmp_path)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_a_canvas_that_patches_do_not_tile_is_refused():
    with pytest.raises(UserError, match=r"canvas.*100.*multiple of 8"):
        base_config(100, 400)
