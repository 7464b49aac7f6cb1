"""What the command line does with mistakes: one line that names file, field, value and mend, and nothing half-made."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny_model, tiny_values, write_folder

from csp_jax import cli
from csp_jax.errors import UserError, full_disk_named
from csp_jax.models.registry import save_model
from csp_jax.world import WorldConfig, build
from csp_jax.world.tokenizer import build_tokenizer

WORLD = WorldConfig(statistics_scenes=100)
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a world and a picture."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = build_tokenizer(WORLD, scenes=20, vocab_size=400)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2}
    save_model(write_folder(folder / "checkpoint", tiny_values(**sizes), tokenizer), tiny_model(3, **sizes))
    build(WORLD, folder / "world", {"train": 20, "test": 3})
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(folder / "picture.png")
    return folder


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command that has to fail; returns the one line that it says."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["csp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code not in (0, None)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err.strip()

    return run


@pytest.fixture
def training(ground: Path, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """A training's file with settings, and its run folder."""

    def write(**settings: object) -> tuple[Path, str]:
        out = str(tmp_path / "run")
        values: dict[str, object] = {
            "model": {"checkpoint": str(ground / "checkpoint")},
            "data": {"shards": str(ground / "world")},
            "run": {"out": out, "steps": 1, "progress": False},
            **settings,
        }
        file = tmp_path / "training.yaml"
        file.write_text(yaml.safe_dump(values))
        return file, out

    return write


def test_an_unknown_field(training, refusal):
    file, out = training(optimizer={"learning_rat": 1})
    said = refusal("train", file)
    for part in (str(file), "optimizer.learning_rat", "no such field", "csp doctor --config"):
        assert part in said
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.beta1=2", ("optimizer.beta1", "2", "less than or equal to 1")),
        ("loss.name=simp", ("loss.name", "simp", "'sft', 'simpo'")),
        ("batch.rows=0", ("batch.rows", "0", "greater than or equal to 1")),
        ("optimizer", ("optimizer", "field=value")),
    ],
)
def test_a_value_out_of_range(training, refusal, override, parts):
    file, out = training()
    said = refusal("train", file, override)
    assert all(part in said for part in parts), said
    assert not Path(out).exists()


def test_a_file_that_is_not_there_or_no_yaml(refusal, tmp_path):
    assert "nowhere.yaml" in refusal("train", tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "bad.yaml" in refusal("train", tmp_path / "bad.yaml")


def test_a_picture_that_is_missing_or_corrupt(ground, refusal, tmp_path):
    said = refusal("ask", tmp_path / "none.png", "Is it?", "--model", ground / "checkpoint")
    assert "none.png" in said
    assert "Check the path" in said
    (tmp_path / "broken.png").write_bytes((ground / "picture.png").read_bytes()[:60])
    said = refusal("ask", tmp_path / "broken.png", "Is it?", "--model", ground / "checkpoint")
    assert "broken.png" in said
    assert "Replace the file" in said


def test_shards_of_another_schema(ground, refusal, tmp_path):
    shutil.copytree(ground / "world", tmp_path / "world")
    for name in ("manifest.json", "dataset_info.json"):
        file = tmp_path / "world" / name
        values = json.loads(file.read_text())
        for field in ("schema_version", "version"):
            if field in values:
                values[field] = "9.0.0"
        file.write_text(json.dumps(values))
    said = refusal("eval", ground / "checkpoint", tmp_path / "world")
    assert "9.0.0" in said
    assert str(tmp_path / "world") in said


def test_a_split_and_a_protocol_that_are_not_there(ground, refusal):
    said = refusal("eval", ground / "checkpoint", ground / "world", "--protocol", "spoken")
    assert all(words in said for words in ("--protocol", "spoken", "exact or verbal"))
    said = refusal("eval", ground / "checkpoint", ground / "world", "--split", "tset")
    assert "tset" in said
    assert "test" in said


def test_a_checkpoint_of_another_family_or_shape(ground, refusal, tmp_path):
    def changed(name: str, change: Callable[[dict], None]) -> Path:
        shutil.copytree(ground / "checkpoint", tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        change(values)
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        return tmp_path / name

    other = changed("other", lambda values: values.update(model_type="blip"))
    said = refusal("eval", other, ground / "world")
    assert "blip" in said
    assert "llava" in said
    wide = changed("wide", lambda values: values["text_config"].update(intermediate_size=64))
    said = refusal("eval", wide, ground / "world")
    assert "(32, 48)" in said
    assert "config.json" in said
    deep = changed("deep", lambda values: values["text_config"].update(num_hidden_layers=3))
    assert "incomplete" in refusal("eval", deep, ground / "world")
    assert str(tmp_path) in refusal("eval", tmp_path / "nothing", ground / "world")


def test_a_run_folder_of_another_training(training, refusal, tmp_path):
    file, out = training(seed=1)
    Path(out).mkdir()
    (Path(out) / "config.yaml").write_text(yaml.safe_dump({"seed": 2}))
    said = refusal("train", file)
    for part in ("config.yaml", "seed = 2", "Choose another run.out"):
        assert part in said


def test_metrics_of_a_file_with_a_bad_line(refusal, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "confidence": 0.5, "correct": 1}\n{"id": "b", "confidence": 7, "correct": 1}\n')
    said = refusal("metrics", file)
    assert "answers.jsonl" in said
    assert "7" in said


def test_the_first_line_of_an_unexpected_trace_is_shown_on_demand(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["csp", "train", str(tmp_path / "nowhere.yaml"), "--debug"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Traceback" in capsys.readouterr().err


def fill_up() -> None:
    with open("/dev/full", "wb") as full:
        full.write(b"x" * 100_000)


def test_a_full_disk_is_named():
    with pytest.raises(UserError, match=r"runs/x: the disk is full.*Free some space"), full_disk_named("runs/x"):
        fill_up()
    with pytest.raises(PermissionError), full_disk_named("runs/x"):
        raise PermissionError(errno.EACCES, "no")
