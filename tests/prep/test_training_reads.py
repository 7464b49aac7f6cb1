"""What the preparation wrote goes into training as it is: recipes, batches, TFDS and Grain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import prep_samples
import pytest
import tensorflow_datasets as tfds
from prep_runs import prepared, records
from tiny import tiny_values, write_folder

from csp_jax.config import RecipeConfig, TrainConfig
from csp_jax.data.recipes import RECIPES
from csp_jax.data.recipes.base import Recipe
from csp_jax.data.shards import ShardSource
from csp_jax.families.interface import open_image
from csp_jax.text import Prompts
from csp_jax.train.loop import train
from csp_jax.world import WorldConfig
from csp_jax.world.tokenizer import build_tokenizer

ROOM = {"prompt": 600, "groups": 8, "length": 400, "targets": 40, "responses": 64}
SIDE = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_values(vocab_size=1024)
    values["vision_config"].update(image_size=SIDE, patch_size=12)
    tokenizer = build_tokenizer(WorldConfig(statistics_scenes=100), scenes=20)
    return write_folder(tmp_path_factory.mktemp("checkpoint"), values, tokenizer)


def recipe(checkpoint: Path, name: str, objective: str = "sft", **settings: Any) -> Recipe:
    config = RecipeConfig(name=name, shape=ROOM, **settings)
    return RECIPES[name](config, str(checkpoint), Prompts(), objective)


def texts(made: Recipe, sample: Any) -> list[str]:
    tokenizer = made.family.tokenizer
    return [
        tokenizer.decode([*sample.prompt, *branch.tokens], skip_special_tokens=False)
        for group in sample.groups
        for branch in group
    ]


def test_rlaif_pairs_train_the_paper_s_recipe_and_the_original_answers(checkpoint, tmp_path):
    done = prepared("rlaifv", tmp_path)
    source = ShardSource(done.directory, "train")
    paper = recipe(checkpoint, "paper", free_form=True)
    drawn = [paper(source[n], np.random.default_rng(n)) for n in range(len(source))]
    for record, one in zip(records(done.directory), drawn, strict=True):
        (picture,) = one.sample.pictures
        assert picture.mask.any()
        (said,) = texts(paper, one.sample)
        assert record.items[0].response.rstrip(".") in said
        assert said.endswith(f"{int(picture.confidence)}%</s>")
    assert recipe(checkpoint, "paper")(source[0], np.random.default_rng(0)).sample is None
    original = recipe(checkpoint, "original", "simpo")
    chosen, rejected = texts(original, original(source[0], np.random.default_rng(0)).sample)
    assert "cake" in chosen
    assert "dog" in rejected


def test_rlaif_pairs_train_the_evidence_recipe_on_request(checkpoint, tmp_path):
    """The preferred answer gets what is visible, the rejected one nothing; without trust there is no label."""
    done = prepared("rlaifv", tmp_path)
    source = ShardSource(done.directory, "train")
    made = recipe(checkpoint, "evidence", free_form=True, clean=0.0, elsewhere=0.0)
    for number, record in enumerate(records(done.directory)):
        sample = made(source[number], np.random.default_rng(number)).sample
        (picture,) = sample.pictures
        labels = [int(re.search(r"(\d+)%</s>$", said)[1]) for said in texts(made, sample)]
        assert labels == [int(picture.confidence), 0]
        for said, response in zip(texts(made, sample), (record.items[0].response, record.items[0].rejected)):
            assert response.rstrip(".") in said
    assert recipe(checkpoint, "evidence")(source[0], np.random.default_rng(0)).sample is None
    settings = {"name": "rlaifv", "root": str(tmp_path / "rlaifv"), "trust": False}
    (unverified, *_) = records(prepared("rlaifv", tmp_path / "plain", source=settings).directory)
    drawn = made(unverified, np.random.default_rng(0))
    assert (drawn.sample, drawn.counts) == (None, {"skipped_without_truth": 1})


@pytest.mark.slow
def test_a_training_takes_the_folder_as_it_is(checkpoint, tmp_path):
    """Two steps of SimPO by `evidence` on RLAIF-V's layout: nothing but the folder's name is given."""
    done = prepared("rlaifv", tmp_path)
    shape = {"prompt": 40, "groups": 2, "length": 200, "targets": 24, "responses": 8}
    values = {
        "model": {"checkpoint": str(checkpoint), "random_init": True},
        "data": {
            "shards": str(done.directory),
            "recipe": {"name": "evidence", "free_form": True, "labels": "grid", "grid": 20, "shape": shape},
        },
        "noise": {"name": "linear"},
        "loss": {"name": "simpo"},
        "batch": {"rows": 8},  # of the eight devices that tests/conftest.py makes
        "run": {"out": str(tmp_path / "run"), "steps": 2, "log_every": 1, "progress": False},
    }
    train(TrainConfig.model_validate(values))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_existence_questions_train_the_evidence_recipe(checkpoint, tmp_path):
    done = prepared("coco", tmp_path, pack={"group": True})
    made = recipe(checkpoint, "evidence", clean=0.0, items=8)
    for record in records(done.directory):
        drawn = made(record, np.random.default_rng(1))
        asked = texts(made, drawn.sample)
        assert len(asked) == 2 * len(record.items)
        for item in record.items:
            assert sum(item.question in text for text in asked) == 2


def test_materialized_pictures_are_shown_as_they_are_with_their_labels(checkpoint, tmp_path):
    levels = {"mode": "materialized", "levels": [0, 30, 100], "t_max": 50}
    done = prepared("folder", tmp_path, localize={"nothing": "keep"}, perturb=levels)
    made = recipe(checkpoint, "materialized")
    seen = set()
    for record in records(done.directory):
        by_label = {int(item.confidence): item for item in record.items}
        for seed in range(12):
            sample = made(record, np.random.default_rng(seed)).sample
            (picture,) = sample.pictures
            (said,) = texts(made, sample)
            label = int(re.search(r"(\d+)%</s>$", said)[1])
            shown = made.family.canvas(open_image(by_label[label].perturbed_image))
            np.testing.assert_array_equal(picture.canvas, shown)
            assert not picture.mask.any()
            seen.add(label)
    assert seen == {0, 30, 100}
    simpo = recipe(checkpoint, "materialized", "simpo")
    first, second = texts(simpo, simpo(record, np.random.default_rng(0)).sample)
    assert {int(re.search(r"(\d+)%</s>$", said)[1]) for said in (first, second)} in ({0, 100}, {30, 70})


def test_tensorflow_datasets_reads_the_folder(tmp_path):
    done = prepared("pope", tmp_path, pack={"group": True})
    stored = records(done.directory)
    found = tfds.builder_from_directory(str(done.directory)).as_data_source("train")
    assert len(found) == len(stored)
    for row, record in zip(found, stored, strict=True):
        assert row["id"].decode() == record.id
        assert list(row["images"]) == list(record.images)
        assert [text.decode() for text in row["items"]["question"]] == [item.question for item in record.items]


def test_the_samples_pictures_are_what_training_opens(tmp_path):
    (record, *_) = records(prepared("vqav2", tmp_path).directory)
    assert open_image(record.images[0]).size == (prep_samples.WIDTH, prep_samples.HEIGHT)
