"""`csp sample`: what it writes, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import csp_on_hosts
from PIL import Image
from tiny import random_canvas, tiny_model, tiny_values, write_folder
from typer.testing import CliRunner

from csp_jax.cli import app
from csp_jax.data.pictures import show
from csp_jax.errors import UserError
from csp_jax.families.interface import open_image
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model, save_model
from csp_jax.rollout import greedy_answer
from csp_jax.sample import questions
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow

WORLD = WorldConfig(statistics_scenes=100)
ASKED = ("Is there a dog in the image?", "How many cats are there?", "Is it large?")
Lines = list[dict[str, Any]]
Command = Callable[..., Lines]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pictures and a file of questions about them."""
    folder = tmp_path_factory.mktemp("sample")
    tokenizer = build_tokenizer(WORLD, scenes=20, vocab_size=400)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2}
    save_model(write_folder(folder / "checkpoint", tiny_values(**sizes), tokenizer), tiny_model(3, **sizes))
    rows = []
    for number, question in enumerate(ASKED):
        Image.fromarray(random_canvas(np.random.default_rng(number))).save(folder / f"{number}.png")
        rows.append({"id": f"q{number}", "image": f"{number}.png", "question": question})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(ground: Path, tmp_path: Path) -> Command:
    def run(*options: object, out: Path = tmp_path / "answers.jsonl") -> Lines:
        words = ["sample", ground / "checkpoint", ground / "asked.jsonl", out, "--max-tokens", 5, "--samples", 2]
        result = CliRunner().invoke(app, [*map(str, words), *map(str, options)], catch_exceptions=False)
        assert result.exit_code == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def tokens(lines: Lines) -> list[list[list[int]]]:
    return [[answer["tokens"] for answer in line["answers"]] for line in lines]


def test_answers_are_written_whatever_the_batches(ground, command, tmp_path):
    lines = command()
    assert [(line["id"], line["question"]) for line in lines] == [(f"q{n}", q) for n, q in enumerate(ASKED)]
    family = open_family(ground / "checkpoint")
    end = family.tokenizer.token_to_id(family.end_of_answer)
    assert [line["image_id"] for line in lines] == ["0.png", "1.png", "2.png"]
    for answer in (answer for line in lines for answer in line["answers"]):
        assert 1 <= len(answer["tokens"]) == len(answer["log_probs"]) <= 5
        assert answer["ended"] == (answer["tokens"][-1] == end)
        said = answer["tokens"][:-1] if answer["ended"] else answer["tokens"]
        assert answer["text"] == family.tokenizer.decode(said).strip()
        assert max(answer["log_probs"]) <= 0
    assert len({tuple(t) for row in tokens(lines) for t in row}) > 3
    assert tokens(command("--rows", 1, out=tmp_path / "one.jsonl")) == tokens(lines)
    assert tokens(command("--seed", 1, out=tmp_path / "other.jsonl")) != tokens(lines)


def test_greedy_answers_are_those_of_ask(ground, command):
    lines = command("--temperature", 0)
    folder = ground / "checkpoint"
    family = open_family(folder)
    picture = show(family, open_image(ground / "1.png"))
    wanted = greedy_answer(load_model(folder), family, picture, ASKED[1], most=5)
    assert [answer["text"] for answer in lines[1]["answers"]] == [wanted, wanted]


def test_it_goes_on_from_what_is_there(command, tmp_path):
    lines = command()
    whole = (tmp_path / "answers.jsonl").read_text()
    first = whole.splitlines(keepends=True)
    resumed, partial = tmp_path / "resumed.jsonl", tmp_path / "resumed.jsonl.partial"
    changed = first[0].replace(ASKED[0], "kept")
    partial.write_text(changed + first[1][:40])  # a line, and one that was cut off
    found = command(out=resumed)
    assert [line["question"] for line in found] == ["kept", *ASKED[1:]]
    assert tokens(found) == tokens(lines)
    assert not partial.exists()
    before = resumed.stat().st_mtime_ns
    command(out=resumed)
    assert resumed.stat().st_mtime_ns == before


def test_two_processes_share_the_questions(ground, command, tmp_path):
    """The lines of one process, in its order, whoever said them; what one of them had is not said again."""
    lines, out = command(), tmp_path / "together.jsonl"
    kept = json.dumps(lines[1]).replace(ASKED[1], "kept")
    (tmp_path / "together.jsonl.part-2-of-2.partial").write_text(kept + "\n")
    arguments = ("sample", ground / "checkpoint", ground / "asked.jsonl", out, "--max-tokens", 5, "--samples", 2)
    first, second = csp_on_hosts(2, *arguments)
    assert "(2 of them answered now)" in first
    assert second == ""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["question"] for line in found] == [ASKED[0], "kept", ASKED[2]]
    assert tokens(found) == tokens(lines)
    assert [file.name for file in tmp_path.glob("together*")] == ["together.jsonl"]


def test_another_setting_is_refused(command, tmp_path):
    command()
    with pytest.raises(UserError, match="were made with 0") as caught:
        command("--seed", 7)
    assert (caught.value.field, caught.value.value) == ("seed", 7)


@pytest.mark.parametrize(
    ("line", "field"),
    [('{"id": "a"', None), ("[1]", None), ('{"id": "a", "image": "0.png"}', "question"), ('{"id": 3}', "id")],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, field):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"id": "q", "image": "0.png", "question": "?"}\n' + line)
    with pytest.raises(UserError) as caught:
        list(questions(file, ""))
    assert (caught.value.file, caught.value.field) == (f"{file}:2", field)


def test_ids_that_stand_twice_are_refused(ground, command):
    file = ground / "asked.jsonl"
    before = file.read_text()
    file.write_text(before + before.splitlines()[0])
    try:
        with pytest.raises(UserError, match="two questions") as caught:
            command()
    finally:
        file.write_text(before)
    assert caught.value.value == "q0"


def test_questions_of_a_data_set(tmp_path):
    build(WORLD, tmp_path / "world", {"test": 2})
    found = list(questions(tmp_path / "world", "test"))
    assert len({question.id for question in found}) == len(found) > 2
    assert all(question.question.endswith(("?", ".")) for question in found)
    assert min(open_image(found[0].image).size) > 1
