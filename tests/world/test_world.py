"""Determinism, random access, separate splits, and the data set that `build` writes."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.records import decode_mask, encode
from csp_jax.world import World, WorldConfig, build

SPLITS = ("base", "train", "validation", "test")


def test_same_seed_split_and_index_give_the_same_record_in_any_order(world):
    forward = [encode(world.record("train", index)) for index in range(20)]
    other = World(WorldConfig())
    other.record("test", 5)
    backward = [encode(other.record("train", index)) for index in reversed(range(20))]
    assert forward == backward[::-1]


def test_another_seed_gives_another_world(world):
    other = World(WorldConfig(seed=1))
    assert all(other.record("test", i).images != world.record("test", i).images for i in range(20))


def test_no_two_scenes_are_alike_within_or_across_splits(world):
    pictures = [
        hashlib.sha256(np.ascontiguousarray(world.scene(split, index).render())).hexdigest()
        for split in SPLITS
        for index in range(250)
    ]
    assert len(set(pictures)) == len(pictures)


def test_identifiers_are_unique(world, records):
    everything = [record for part in records.values() for record in part]
    everything += [world.record(split, index) for split in ("train", "validation") for index in range(50)]
    for identifiers in (
        [record.id for record in everything],
        [record.image_id for record in everything],
        [item.id for record in everything for item in record.items],
    ):
        assert len(set(identifiers)) == len(identifiers)


def test_no_question_is_asked_twice_about_a_scene(records):
    for record in (*records["base"], *records["test"]):
        questions = [item.question for item in record.items]
        assert len(set(questions)) == len(questions)


def test_the_record_shows_the_scene(world):
    for index in range(30):
        record, scene = world.record("test", index), world.scene("test", index)
        picture = np.asarray(Image.open(io.BytesIO(record.images[0])))
        assert picture.shape == (80, 80, 3)
        np.testing.assert_array_equal(picture, scene.render())
        for region, mask in zip(record.regions, scene.visible_masks(), strict=True):
            np.testing.assert_array_equal(decode_mask(region.mask, 80, 80), mask)
            ys, xs = np.nonzero(mask)
            assert region.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_unknown_splits_and_indices_are_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"training.*Use one of base, train, validation, test"):
        world.record("training", 0)
    with pytest.raises(UserError, match="index = -1"):
        world.record("test", -1)
    with pytest.raises(UserError, match=r"splits.test = 0"):
        build(WorldConfig(statistics_scenes=100), tmp_path, {"test": 0})
    assert not list(tmp_path.iterdir())


def test_build_writes_what_the_world_holds(tmp_path):
    config = WorldConfig(name="small_world", seed=3, statistics_scenes=200)
    calls: list[tuple[str, int, int]] = []
    build(config, tmp_path, {"train": 120, "test": 7}, lambda *call: calls.append(call), records_per_shard=50)

    assert calls == [("train", 100, 120), ("train", 120, 120), ("test", 7, 7)]
    import tensorflow_datasets as tfds  # reads it with code that is not ours

    builder = tfds.builder_from_directory(str(tmp_path))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 120,
        "test": 7,
    }
    world = World(config)
    for split, index in (("train", 0), ("train", 119), ("test", 6)):
        stored = builder.as_data_source(split)[index]
        expected = world.record(split, index)
        assert stored["id"].decode() == expected.id
        assert stored["images"][0] == expected.images[0]

    metadata = json.loads((tmp_path / "manifest.json").read_text())["splits"]["test"]["metadata"]
    assert WorldConfig(**metadata["world"]) == config
    assert len(metadata["statistics"]["frequency"]) == len(metadata["statistics"]["classes"]) == 60
    with pytest.raises(UserError, match="exists already"):
        build(config, tmp_path, {"test": 7})
    build(config, tmp_path, {"test": 9}, overwrite=True)
    assert tfds.builder_from_directory(str(tmp_path)).info.splits["test"].num_examples == 9
