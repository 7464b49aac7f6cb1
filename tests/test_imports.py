"""Imports point one way only, and what must stay light loads nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, PREPARATION = ROOT / "csp_jax", ROOT / "data_prep"

# A module may import its own line and those above it.
ORDER = (
    ("records", "text", "config", "errors", "manifest", "split_writer"),
    ("families", "world", "tasks"),
    ("data", "perturb", "sharding", "models"),
    ("losses",),
    ("train",),
    ("readers", "rollout", "rewards", "calibration"),
    ("policy",),
    ("evaluate", "scenes", "report", "plan", "results", "parity", "sample"),
    ("ask", "bench", "demo"),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def python_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, also inside functions, with its line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names if module == "csp_jax")


def part(module: str) -> str:
    """`csp_jax.models.llava` -> `models`."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("file", python_files(PACKAGE), ids=module_name)
def test_imports_point_one_way(file):
    mine = part(module_name(file))
    if not mine:
        return  # the package itself
    assert mine in LEVEL, f"{mine} has no place in the order of imports"
    for module, line in imports(file):
        other = part(module) if module.startswith("csp_jax") else ""
        if other:
            assert LEVEL.get(other, -1) <= LEVEL[mine], f"{file}:{line}: {mine} must not import {other}"


def test_every_part_that_is_named_exists_or_is_planned():
    planned = {"tasks", "plan", "__main__"}
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(LEVEL) - planned <= there
    assert not there - set(LEVEL) - {"__init__", "__pycache__"}


@pytest.mark.parametrize("file", python_files(PACKAGE), ids=module_name)
def test_no_torch_in_the_package(file):
    used = {module.partition(".")[0] for module, _ in imports(file)}
    assert not used & {"torch", "torchvision", "tensorflow", "data_prep", "tests"}


def test_no_jax_in_data_preparation():
    for file in python_files(PREPARATION):
        for module, line in imports(file):
            top = module.partition(".")[0]
            assert top not in {"jax", "flax", "optax", "orbax"}, f"{file}:{line}"
            if top == "csp_jax" and module != "csp_jax":
                allowed = {"records", "text", "errors", "config", "manifest", "split_writer"}
                assert part(module) in allowed, f"{file}:{line}"


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that an import adds in a fresh process."""
    code = f"import json, sys\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps([*set(sys.modules) - before]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "module",
    ["records", "text", "config", "world", "families.registry", "data.batch", "data.recipes", "data.shards"],
)
def test_what_workers_import_is_light(module):
    """Data workers and data preparation start without jax."""
    assert not loaded_by(f"import csp_jax.{module}") & {
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax",
        "torch",
        "tensorflow",
    }


def test_words_need_the_standard_library_alone():
    assert loaded_by("import csp_jax.text") - set(sys.stdlib_module_names) == {"csp_jax"}


NO_TORCH = """
class NoTorch:
    def find_spec(self, name, *details):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, NoTorch())
"""


def test_training_needs_no_torch():
    """Where torch is not installed, all that the command line needs is still there."""
    loaded = loaded_by(f"{NO_TORCH}\nimport csp_jax.train.loop, csp_jax.evaluate, csp_jax.report, csp_jax.cli")
    assert "jax" in loaded
    assert "torch" not in loaded
