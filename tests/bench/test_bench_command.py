"""`csp bench` from end to end on a very small model, and what it makes for itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_ground import PROMPT, SIZES, make_ground

from csp_jax import cli
from csp_jax.bench.made import Lengths, made_record, question_of
from csp_jax.errors import UserError
from csp_jax.families.registry import open_family
from csp_jax.records import decode, encode

SIZE = ["--rows", "8", "--accumulation", "1", "--prompt", str(PROMPT), "--samples", "3", "--tokens", "4"]
SIZE += ["--repeats", "2"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command with --json."""

    def run(*arguments: object) -> list[dict]:
        monkeypatch.setattr("sys.argv", ["csp", "bench", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert stopped.value.code == 0, captured.err
        return json.loads(captured.out)

    return run


def check(found: list[dict], *parts: str) -> dict[str, dict]:
    """What holds of all rows; the rows by name."""
    assert [row["task"] for row in found] == [*parts, "matmul float32"]
    for row in found:
        assert len(row["all_seconds"]) == row["turns"] == 2
        assert row["seconds"] >= row["best_seconds"] > 0
        assert row["steps_per_second"] == pytest.approx(1 / row["seconds"])
        assert row["flops"] > 0
        assert row["peak_bytes"] > 0
    for row in found[:-1]:
        assert 0 < row["filled"] <= 1
        assert row["mfu"] > 0
    return {row["task"]: row for row in found}


@pytest.mark.slow
def test_scoring_and_sft(ground, tmp_path, rows):
    found = rows("--model", ground / "checkpoint", *SIZE, "--task", "base", "--task", "sft", "--keep", tmp_path)
    by_name = check(found, "base", "sft")
    for row in by_name.values():
        assert row["ratio_to"] == "sft"
    for name in ("base", "sft"):
        assert by_name[name]["samples"] == by_name[name]["images"] == 8
        assert by_name[name]["program_bytes"] > 0
    assert 2.5 < by_name["sft"]["flops"] / by_name["base"]["flops"] < 3  # no gradient with respect to pictures
    # what was made serves again
    assert (tmp_path / f"checkpoint-{PROMPT}-records" / "manifest.json").exists()


@pytest.mark.slow
def test_pairs(ground, rows):
    by_name = check(rows("--model", ground / "checkpoint", *SIZE, "--task", "simpo"), "simpo")
    assert by_name["simpo"]["samples"] == 2 * by_name["simpo"]["images"] == 16


@pytest.mark.slow
def test_a_policy(ground, rows):
    found = rows("--model", ground / "checkpoint", *SIZE, "--task", "grpo")
    by_name = check(found, "grpo", "grpo rollout", "grpo update")
    whole, rollout, update = (by_name[name] for name in ("grpo", "grpo rollout", "grpo update"))
    assert update["samples"] == rollout["samples"] == 24
    fed = update["tokens"] - 8 * PROMPT  # of each response all but the last token
    assert 0 < fed <= 24 * 3
    assert update["sequence_tokens"] == 24 * (PROMPT + 1) + fed
    assert whole["flops"] == rollout["flops"] + update["flops"]
    for both, *halves in zip(whole["all_seconds"], rollout["all_seconds"], update["all_seconds"]):
        assert both == pytest.approx(sum(halves))


@pytest.mark.slow
def test_evaluation(ground, rows):
    found = rows("--model", ground / "checkpoint", *SIZE, "--task", "eval", "--task", "verbal", "--task", "prefill")
    by_name = check(found, "eval", "verbal", "prefill", "distribution")
    assert by_name["eval"]["images"] == 8
    assert by_name["eval"]["samples"] == 8 * 6 * 2  # six questions, two candidates each
    assert by_name["distribution"]["ratio_to"] == "prefill"
    assert by_name["distribution"]["tokens"] > by_name["prefill"]["tokens"]


def test_a_configuration_without_weights_and_records(ground, tmp_path, rows):
    """Random weights and made records in their place; settings go on top."""
    bare = tmp_path / "checkpoint"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bare / name).write_bytes((ground / "checkpoint" / name).read_bytes())
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"model: {{checkpoint: {bare}, lora: {{rank: 2}}}}\n"
        f"data: {{shards: {tmp_path / 'none'}, recipe: {{name: paper, items: 1, shape: {{length: 96}}}}}}\n"
        "loss: {name: sft}\nbatch: {rows: 8, accumulation: 1}\n"
    )
    found = rows(file, "--repeats", 1, "--set", "model.lora.rank=3")
    assert [row["task"] for row in found] == ["sft", "matmul float32"]
    assert found[0]["samples"] == 8


def test_questions_have_the_length_that_is_asked_for(ground):
    family = open_family(ground / "checkpoint")
    slots = (SIZES.pixels // SIZES.patch) ** 2
    for length in (PROMPT, 64, 115):
        question = question_of(family, SIZES.pixels, length)
        assert len(family.encode(question, None, (slots,)).tokens) == length
    assert question_of(family, SIZES.pixels, Lengths().prompt) == "Is there a dog in the image?"
    with pytest.raises(UserError, match="shortest question"):
        question_of(family, SIZES.pixels, 10)


def test_made_records_are_records():
    questions = ("Is there a dog in the image?", "Is there a cat in the image?")
    record = made_record(3, questions, 40)
    assert decode(encode(record)) == record
    assert tuple(item.question for item in record.items) == questions
    assert made_record(3, questions, 40) == record
    assert made_record(4, questions, 40).images != record.images


def test_what_cannot_be_timed(ground, monkeypatch, capsys):
    (ground / "sft.yaml").write_text("loss: {name: sft}\n")
    for arguments, words in (
        (["--task", "dpo"], "no such task"),
        (["--model", "nothing"], "no such model"),
        ([str(ground / "sft.yaml"), "--task", "grpo"], "nothing to time"),
    ):
        monkeypatch.setattr("sys.argv", ["csp", "bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
