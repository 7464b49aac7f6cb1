"""Overlap of two data sets' masks against counts by hand."""

from __future__ import annotations

import numpy as np
import prep_samples
import pytest
from prep_runs import config_of, prepared

from csp_jax.errors import UserError
from data_prep.compare import overlap, pairs, table
from data_prep.run import prepare


def test_overlap():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert overlap(a, b) == 1
    a[:2], b[1:3] = True, True
    assert overlap(a, b) == pytest.approx(4 / 12)


def test_a_data_set_against_its_boxes_and_against_itself(tmp_path):
    first = prepared("folder", tmp_path)
    source = {"name": "shards", "root": str(first.directory), "masks": False}
    second = prepare(config_of("folder", tmp_path, tmp_path / "boxes", dataset="boxes", source=source))
    disc, box = prep_samples.disc().sum(), 40 * 40
    mug, cup = pairs(first.directory, second.directory, "train")
    assert mug.found == mug.box == pytest.approx(disc / box)
    assert mug.area == pytest.approx(prep_samples.disc().mean())
    assert cup.found == 1  # it never had more than its box
    everything = table(first.directory, second.directory, "train")[-1]
    assert (everything["object"], everything["regions"]) == ("all", 2)
    assert everything["mean IoU"] == pytest.approx((1 + disc / box) / 2)
    assert table(first.directory, first.directory, "train")[-1]["mean IoU"] == 1


def test_data_sets_about_other_pictures_have_nothing_to_compare(tmp_path):
    first, second = prepared("folder", tmp_path / "a"), prepared("gqa", tmp_path / "b")
    with pytest.raises(UserError, match="has no picture and box"):
        table(first.directory, second.directory, "train")
