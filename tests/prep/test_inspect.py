"""The page of a data set: what it shows is what the shards hold."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from prep_runs import prepared, records

from csp_jax.errors import UserError
from data_prep.inspect import area_bars, outline, outlined, page


def test_the_page_counts_and_shows_what_is_there(tmp_path):
    done = prepared("folder", tmp_path, segment={"model": {"name": "grabcut"}})
    html = page(done.directory, "train", 10)
    assert "3 records with 3 questions" in html
    assert "3 rows = 3 questions packed + 0" in re.sub(r"\s+", " ", html)
    for word in ("mug", "Tasse", "Welche Farbe hat die Tasse? ☕", "regions_given"):
        assert word in html
    embedded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(embedded) == 6 + 6 + 1  # two pictures at five levels each, one without a region
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data in embedded}
    assert sizes == {(96, 72)}
    clear, buried = (np.asarray(Image.open(io.BytesIO(base64.b64decode(embedded[n])))).astype(int) for n in (1, 5))
    inside = np.abs(clear - buried)[24:48, 32:56].mean()
    outside = np.abs(clear - buried)[:, 75:].mean()
    assert inside > 30
    assert outside < 3


def test_drop_reasons_are_on_the_page_and_text_is_escaped(tmp_path):
    done = prepared("amber", tmp_path)
    html = page(done.directory, "train", 2)
    assert "no_answer" in html
    assert html.count('class="row"') == 2
    with pytest.raises(UserError, match="no such split"):
        page(done.directory, "elsewhere", 2)


def test_outlines_are_those_of_scipy():
    mask = scipy.ndimage.gaussian_filter(np.random.default_rng(0).random((40, 50)), 3) > 0.5
    eroded = scipy.ndimage.binary_erosion(mask, iterations=2)
    np.testing.assert_array_equal(outline(mask, 2), mask & ~eroded)


def test_boxes_are_drawn_where_they_are(tmp_path):
    mug, *_ = records(prepared("folder", tmp_path).directory)
    plain = np.zeros((72, 96, 3), np.uint8)
    drawn = outlined(mug, plain).any(axis=-1)
    ys, xs = np.where(drawn)
    x0, y0, x1, y1 = mug.regions[0].box
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


def test_area_histogram_holds_every_mask():
    areas = np.random.default_rng(0).random(500) ** 3
    assert sum(bar["count"] for bar in area_bars(areas.tolist())) == 500
