"""The evaluation pass against transformers on the same checkpoint: whole sequences, one at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loopback import csp_on_hosts, free_port
from tiny import tiny_model, tiny_values, write_folder
from transformers import LlavaForConditionalGeneration

from csp_jax.calibration.protocols import Shots
from csp_jax.config import ParallelConfig
from csp_jax.data.shards import ShardSource
from csp_jax.evaluate import PROTOCOLS, Answers, Scorer, ask_records, evaluate, open_asking
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model, save_model
from csp_jax.records import Item, Record
from csp_jax.results import result_rows
from csp_jax.scenes import example_shots, open_scenes
from csp_jax.sharding import make_mesh
from csp_jax.text import Prompts, parse_confidence
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

WORLD = WorldConfig(statistics_scenes=100)
SCENES, CLIP_MEAN, CLIP_STD = 5, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights, and a world of a few scenes."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = build_tokenizer(WORLD, scenes=20, vocab_size=400)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2}
    checkpoint = write_folder(folder / "checkpoint", tiny_values(**sizes), tokenizer)
    save_model(checkpoint, tiny_model(3, **sizes))
    build(WORLD, folder / "world", {"train": 4, "test": SCENES})
    return folder


@functools.cache
def asked(ground: Path, devices: int, rows: int, shots: Shots = ()) -> Answers:
    mesh = make_mesh(ParallelConfig(data=devices), jax.devices()[:devices])
    folder = ground / "checkpoint"
    source = ShardSource(ground / "world", "test")
    scenes = open_scenes(open_family(folder), Prompts(), source, shots=shots)
    return evaluate(Scorer(load_model(folder), mesh), scenes, rows=rows)


class Original:
    """The checkpoint in transformers; texts are scored and continued one by one, without a cache or a batch."""

    def __init__(self, folder: Path):
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.family: HostFamily = open_family(folder)

    def inputs(self, record: Record, tokens: tuple[int, ...]) -> dict[str, Any]:
        canvas = self.family.canvas(open_image(record.images[0])).astype(np.float32) / 255
        pixels = (canvas - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        return {
            "input_ids": torch.tensor([tokens]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1))[None],
        }

    @torch.no_grad()
    def log_prob(self, record: Record, question: str, answer: str, *, end: bool) -> float:
        encoded = self.family.encode(question, answer, (4,))
        logits = self.model(**self.inputs(record, encoded.tokens)).logits[0].log_softmax(-1)
        scored = [i for i, mark in enumerate(encoded.answer) if mark][: None if end else -1]
        return float(sum(logits[i - 1, encoded.tokens[i]] for i in scored))

    @torch.no_grad()
    def says(self, record: Record, question: str, most: int) -> str:
        tokens = list(self.family.encode(question, None, (4,)).tokens)
        start = len(tokens)
        for _ in range(most):
            tokens.append(int(self.model(**self.inputs(record, tuple(tokens))).logits[0, -1].argmax()))
            if tokens[-1] == self.family.tokenizer.token_to_id("</s>"):
                break
        return self.family.tokenizer.decode(tokens[start:])


@pytest.fixture(scope="module")
def original(ground: Path) -> Original:
    return Original(ground / "checkpoint")


def records_of(ground: Path, split: str = "test") -> list[Record]:
    source = ShardSource(ground / "world", split)
    return [source[index] for index in range(len(source))]


def asked_items(records: list[Record]) -> list[tuple[Record, Item]]:
    return [(record, item) for record in records for item in record.items if len(item.candidates) > 1]


def test_every_question_is_asked_once(ground):
    wanted = [item.id for _, item in asked_items(records_of(ground))]
    for rows in (1, 2, 4):
        assert asked(ground, 1, rows).ids == wanted


def test_confidences_are_those_of_separate_sequences_in_transformers(ground, original):
    answers, prompts = asked(ground, 1, 2), Prompts()
    place = {identifier: number for number, identifier in enumerate(answers.ids)}
    for record, item in asked_items(records_of(ground))[:3]:
        at = place[item.id]
        for number, candidate in enumerate(item.candidates):
            query = prompts.ask_confidence(item.question, candidate)
            logs = [original.log_prob(record, query, f"{percent}%", end=False) for percent in range(101)]
            shares = np.exp(logs)
            wanted = float(shares @ np.arange(101) / 100 / shares.sum())
            assert answers.expected[at, number] == pytest.approx(wanted, abs=2e-5)
            direct = original.log_prob(record, prompts.ask(item.question), candidate, end=True)
            assert answers.direct_log_probs[at, number] == pytest.approx(direct, abs=1e-3)


def test_greedy_confidences_are_what_greedy_decoding_says(ground, original):
    answers = asked(ground, 1, 2)
    place = {identifier: number for number, identifier in enumerate(answers.ids)}
    for record, item in asked_items(records_of(ground))[:4]:
        query = Prompts().ask_confidence(item.question, item.candidates[0])
        said = parse_confidence(original.says(record, query, 5))
        found = answers.greedy[place[item.id], 0]
        assert (said is None and np.isnan(found)) or found == said


def test_devices_and_rows_change_nothing(ground):
    one = asked(ground, 1, 1)
    for devices, rows in ((1, 4), (4, 4)):
        many = asked(ground, devices, rows)
        order = [many.ids.index(identifier) for identifier in one.ids]
        np.testing.assert_allclose(many.expected[order], one.expected, atol=1e-5)
        np.testing.assert_array_equal(many.direct[order], one.direct)


@pytest.mark.parametrize(("limit", "hosts"), [(0, 2), (1, 2)])  # one record, two hosts: one of them has nothing to ask
def test_hosts_ask_their_parts_and_all_know_all_answers(ground, tmp_path, limit, hosts):
    child = [sys.executable, str(Path(__file__).parent / "evaluate_child.py"), str(free_port()), str(hosts)]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    files = [tmp_path / f"{host}.npz" for host in range(hosts)]
    running = [
        subprocess.Popen([*child, str(host), str(ground), str(limit), str(file)], env=environment)
        for host, file in enumerate(files)
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * hosts
    alone = asked(ground, 1, 2)
    count = sum(len(asked_items([record])) for record in records_of(ground)[: limit or None])
    for file in files:
        found = Answers.load(file)
        assert found.ids == alone.ids[:count]
        assert found.image_ids == alone.image_ids[:count]
        np.testing.assert_allclose(found.expected, alone.expected[:count], atol=1e-4)
        np.testing.assert_array_equal(found.truth, alone.truth[:count])


@pytest.mark.slow
def test_the_command_on_two_hosts(ground, tmp_path):
    """Each asks about its part; the first one prints and saves what all were answered."""
    out, alone = tmp_path / "together.npz", asked(ground, 1, 2)
    first, second = csp_on_hosts(
        2, "eval", ground / "checkpoint", ground / "world", "--rows", 2, "--json", "--out", out
    )
    assert second == ""
    scores = result_rows([alone], None, model="checkpoint", recipe="")
    for row, wanted in zip(json.loads(first), scores, strict=True):
        assert (row["split"], row["metric"], row["n"]) == (wanted["split"], wanted["metric"], wanted["n"])
        assert row["value"] == pytest.approx(wanted["value"], abs=1e-4)
    together = Answers.load(out)
    assert together.ids == alone.ids
    np.testing.assert_allclose(together.expected, alone.expected, atol=1e-4)


def test_a_single_question_reads_as_in_the_sweep(ground):
    answers, folder = asked(ground, 1, 2), ground / "checkpoint"
    mesh = make_mesh(ParallelConfig(data=1), jax.devices()[:1])
    record, item = asked_items(records_of(ground))[1]
    other = dataclasses.replace(record, images=records_of(ground)[-1].images)
    scorer = Scorer(load_model(folder), mesh)
    first, second = ask_records(scorer, open_family(folder), Prompts(), [record, other], item)
    np.testing.assert_allclose(first.expected, answers.expected[answers.ids.index(item.id)], atol=1e-5)
    assert np.abs(first.expected - second.expected).max() > 1e-5  # it does look at the picture


def test_shots_stand_before_the_query(ground, original):
    shots = example_shots(ShardSource(ground / "world", "train"), 2)
    first, second = (asked_items([record])[0][1] for record in records_of(ground, "train")[:2])
    assert [shot[0] for shot in shots] == [first.question, second.question]
    assert [(shot[1] == item.truth, shot[2]) for shot, item in zip(shots, (first, second))] == [(True, 100), (False, 0)]
    record, item = asked_items(records_of(ground))[0]
    answers = asked(ground, 1, 1, shots)
    query = Prompts().ask_confidence(item.question, item.candidates[0], shots)
    shares = np.exp([original.log_prob(record, query, f"{percent}%", end=False) for percent in range(101)])
    wanted = float(shares @ np.arange(101) / 100 / shares.sum())
    assert answers.expected[answers.ids.index(item.id), 0] == pytest.approx(wanted, abs=2e-5)


# --- in words --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(ground: Path) -> Path:
    """The checkpoint with a head that says numbers, percent signs, candidates and ends, and hardly anything else."""
    folder = ground / "talker"
    shutil.copytree(ground / "checkpoint", folder)
    model, words = load_model(folder), open_family(folder).tokenizer.get_vocab()
    said = sorted(
        token for word, token in words.items() if word.strip("\u2581\u0120") in (*"0123456789%", "yes", "no", "</s>")
    )
    kernel = np.array(model.decoder.head.kernel[...])
    others = np.setdiff1d(np.arange(kernel.shape[1]), said)
    kernel[:, others] *= 0.05
    kernel[:, words["%"]] *= 3
    model.decoder.head.kernel[...] = jnp.asarray(kernel * 3)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_model(folder, model)
    return folder


@pytest.mark.parametrize("rows", [1, 3])
def test_words_are_those_of_separate_sequences_in_transformers(ground, talker, rows):
    family, prompts, original = open_family(talker), Prompts(), Original(talker)
    scenes = open_scenes(family, prompts, ShardSource(ground / "world", "test"), ask=PROTOCOLS["verbal"])
    mesh = make_mesh(ParallelConfig(data=1), jax.devices()[:1])
    answers = evaluate(open_asking(load_model(talker), family, scenes, mesh), scenes, rows=rows)
    items = asked_items(records_of(ground))
    assert answers.ids == [item.id for _, item in items]
    said, most = [], max(question.tail for scene in scenes for question in scene.questions)
    for number, (record, item) in enumerate(items[:6]):
        for place, candidate in enumerate(item.candidates):
            words = original.says(record, prompts.ask_confidence(item.question, candidate), most)
            wanted = parse_confidence(words)
            said.append(wanted)
            np.testing.assert_equal(answers.greedy[number, place], np.nan if wanted is None else wanted)
        direct = original.says(record, prompts.ask(item.question), most).strip()
        assert answers.direct[number] == (item.candidates.index(direct) if direct in item.candidates else -1)
    np.testing.assert_array_equal(answers.expected, answers.greedy)
    assert len(set(said)) > 2  # it does say numbers, and different ones


def test_answers_survive_the_file(ground, tmp_path):
    answers = asked(ground, 1, 1)
    answers.save(tmp_path / "deep" / "answers.npz")
    again = Answers.load(tmp_path / "deep" / "answers.npz")
    for field in dataclasses.fields(Answers):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(answers, field.name))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["answers.npz"]
