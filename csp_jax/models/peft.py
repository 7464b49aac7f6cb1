"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, strict to read.

PEFT has one A and one B for each linear module of the original. Where the original fuses what are several layers here
(queries, keys and values; gate and up), one module of PEFT is several adapters of ours:

- read: every part takes the whole A, and its own rows of B;
- written: if all parts still hold the same A, that A and the parts' rows of B; else, exactly as well, a module of the
  parts' ranks together, whose A holds theirs one below the other and whose B is block-diagonal. Such a module is taken
  apart again when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from csp_jax.errors import UserError
from csp_jax.models.checkpoint_map import Rows
from csp_jax.models.hub import canonical_key
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import linear_layers, put_adapter
from csp_jax.models.tensor_files import TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LETTERS = ("A", "B")
# Fields that change what an adapter computes, and the values that are implemented.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Fields that do not change it, or that are read below; any other field has to be empty.
KNOWN = frozenset(SUPPORTED) | {
    "auto_mapping",
    "alpha_pattern",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our linear layers within a module of the original: its path, its place in a stack, its rows."""

    path: str
    number: int | None
    rows: Rows | None


@dataclasses.dataclass(frozen=True)
class Factors:
    """One module's A [rank, in] and B [out, rank], as PEFT keeps them."""

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (directory / CONFIG).is_file()


def hub_modules(model: VisionLanguageModel) -> dict[str, list[Part]]:
    """The original's linear modules, by the name that transformers gives them, and what they are here."""
    layers = linear_layers(model)
    modules: dict[str, list[Part]] = {}
    for tensor in type(model).tensors(model.config):
        path = tensor.path.removesuffix(".kernel")
        if path in layers and tensor.path != path:
            for number, key in enumerate(tensor.keys):
                part = Part(path, number if tensor.stacked else None, tensor.rows)
                modules.setdefault(_module_name(model, key.removesuffix(".weight")), []).append(part)
    return modules


def _module_name(model: VisionLanguageModel, key: str) -> str:
    """What transformers calls the module that the hub names by `key`."""
    for pattern, replacement in type(model).modules:
        if pattern.search(key):
            return pattern.sub(replacement, key)
    return key


# --- reading -------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`; UserError names a field whose variant is not implemented."""
    file = directory / CONFIG
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError("no adapter here", file=file, mend="Give a folder that PEFT or `csp train` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON ({error})", file=file, mend="Write the adapter again") from None
    if not isinstance(values, dict):
        raise UserError("not an adapter's configuration", file=file, mend="Write the adapter again")
    for field, supported in SUPPORTED.items():
        if field in values and values[field] not in supported:
            _refuse(file, field, values[field], f"Supported: {', '.join(map(repr, supported))}")
    for field, value in values.items():
        if field not in KNOWN and value:
            _refuse(file, field, value, "Plain LoRA has it empty")
    for field, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (str, list))):
        if not isinstance(values.get(field), kind) or not values[field]:
            raise UserError("is missing or of another kind", file=file, field=field, value=values.get(field))
    return values


def _refuse(file: Path, field: str, value: Any, mend: str) -> NoReturn:
    raise UserError("this variant is not supported", file=file, field=field, value=value, mend=mend)


def targeted(targets: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """PEFT's rule: a text is a regular expression for whole names, a list holds their ends."""
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names if any(name == end or name.endswith(f".{end}") for end in targets)}


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


class AdapterFile:
    """The tensors of an adapter's file by the modules of a model; UserError names a tensor that has none."""

    def __init__(self, file: Path, model: VisionLanguageModel):
        self.file, self.modules = TensorFile(file), hub_modules(model)
        self.spelled = {name: name for name in self.modules}  # modules may have borne other names when it was written
        self.keys: dict[tuple[str, str], str] = {}
        for key in self.file.entries:
            found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
            hub = canonical_key(f"{found[1]}.weight", type(model).aliases) if found else ""
            name = _module_name(model, hub.removesuffix(".weight"))
            if not found or name not in self.modules:
                self._fail("tensor is unknown", key, "The adapter is of another family")
            elif (name, found[2]) in self.keys:
                self._fail("tensor is there under two names", key, "Delete one")
            else:
                self.spelled[name], self.keys[name, found[2]] = found[1], key

    def _fail(self, problem: str, key: str, mend: str) -> NoReturn:
        raise UserError(problem, file=self.file.file, field=key, mend=mend)

    def names(self, targets: str | Sequence[str]) -> list[str]:
        """The modules that `target_modules` means: their tensors, and no others, must be there."""
        wanted = targeted(targets, self.spelled.values())
        chosen = sorted(name for name, spelled in self.spelled.items() if spelled in wanted)
        for name in chosen:
            for letter in LETTERS:
                if (name, letter) not in self.keys:
                    key = f"{PREFIX}{self.spelled[name]}.lora_{letter}.weight"
                    self._fail("tensor is missing", key, "The adapter is incomplete")
        for (name, _), key in self.keys.items():
            if self.spelled[name] not in wanted:
                self._fail("tensor is unknown", key, "Its module is not among target_modules")
        return chosen

    def factors(self, name: str, kernel: tuple[int, ...], rank: int) -> Factors:
        """A module's tensors; `kernel` is the shape of its (first) layer here."""
        rows = self.modules[name][0].rows
        out = kernel[-1] if rows is None else rows.blocks * rows.width
        for letter, shape in (("A", (rank, kernel[-2])), ("B", (out, rank))):
            key = self.keys[name, letter]
            found = self.file.entries[key].shape
            if found != shape:
                problem = f"has shape {found}, model and {CONFIG} need {shape}"
                self._fail(problem, key, "The adapter must be of a model of these sizes")
        return Factors(*(self.file.read(self.keys[name, letter]) for letter in LETTERS))


def _split(parts: Sequence[Part], whole: Factors) -> dict[Part, Factors]:
    """A module's factors as those of its parts. A block-diagonal B is taken apart; a part whose rows are zero, when
    those of others are not, has no adapter."""
    if parts[0].rows is None:
        return {parts[0]: whole}
    rows = {part: part.rows.take(whole.b) for part in parts if part.rows is not None}
    if np.any(whole.b):
        rows = {part: piece for part, piece in rows.items() if np.any(piece)}
    small, rest = divmod(whole.rank, len(rows))
    blocks = {part: slice(number * small, (number + 1) * small) for number, part in enumerate(rows)}
    outside = (np.delete(piece, np.r_[blocks[part]], axis=1) for part, piece in rows.items())
    if rest or not np.any(whole.b) or any(np.any(piece) for piece in outside):
        return {part: Factors(whole.a, piece) for part, piece in rows.items()}
    return {part: Factors(whole.a[blocks[part]], piece[:, blocks[part]]) for part, piece in rows.items()}


def load_adapter(
    model: VisionLanguageModel, directory: Path, *, dropout: float | None = None, dtype: jnp.dtype | None = None
) -> dict[str, Any]:
    """Wrap a model's layers as a folder of PEFT says, in place; returns the configuration that was read.

    The model may be any of the sizes that the adapter was trained with. `dropout` None: the adapter's own; `dtype`
    None: that of the files. Layers of a stack that have no adapter, or one of lower rank, are filled up with zeros:
    those compute nothing and get no gradient.
    """
    config, layers = read_config(directory), linear_layers(model)
    file = AdapterFile(directory / WEIGHTS, model)
    found: dict[str, dict[int | None, Factors]] = {}
    scales: dict[str, set[float]] = {}
    for name in file.names(config["target_modules"]):
        parts, spelled = file.modules[name], file.spelled[name]
        rank = _by_pattern(config.get("rank_pattern") or {}, spelled, config["r"])
        for part, own in _split(parts, file.factors(name, layers[parts[0].path].kernel.shape, rank)).items():
            found.setdefault(part.path, {})[part.number] = own
            scales.setdefault(part.path, set()).add(_scale(config, spelled, rank))
    if not found:
        mend = "It matches no linear layer of this model"
        raise UserError("nothing is targeted", file=directory / CONFIG, field="target_modules", mend=mend)
    rate = config.get("lora_dropout", 0.0) if dropout is None else dropout
    for path, numbered in found.items():
        if len(scales[path]) > 1:
            mend = "The layers of a stack share one scale, alpha / rank"
            raise UserError(f"differs between the layers of {path}", file=directory / CONFIG, field="r", mend=mend)
        a, b = _stacked(numbered, layers[path].kernel.shape)
        arrays = (jnp.asarray(part if dtype is None else part.astype(dtype)) for part in (a, b))
        put_adapter(model, path, *arrays, scale=scales[path].pop(), dropout=rate)
    return config


def _stacked(numbered: Mapping[int | None, Factors], kernel: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Our layout of one layer's factors, or of those of a stack."""
    if None in numbered:
        return numbered[None].a.T, numbered[None].b.T
    (count, into, out), rank = kernel, max(own.rank for own in numbered.values())
    kind = next(iter(numbered.values())).a.dtype
    a, b = np.zeros((count, into, rank), kind), np.zeros((count, rank, out), kind)
    for number, own in numbered.items():
        a[number, :, : own.rank], b[number, : own.rank] = own.a.T, own.b.T
    return a, b
