"""Checkpoints in the hub's layout: strict reading of safetensors into a model, and writing them back.

A family describes its layout as data: a list of `Tensor(path, keys, transform)`. Reading is lazy, one native
leaf at a time; anything unknown, missing or misshapen is an error that names the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from csp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a hub tensor becomes a leaf of ours, and back (`hub_shape` gives what the reverse needs)."""

    name: str
    from_hub: Callable[[np.ndarray], np.ndarray]
    to_hub: Callable[[np.ndarray], np.ndarray]


def _conv_from(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _conv_to(x: np.ndarray) -> np.ndarray:
    size = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(size, size, 3, x.shape[1]).transpose(3, 2, 0, 1)


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", lambda x: x.T, lambda x: x.T)
CONV = Transform("conv", _conv_from, _conv_to)  # [out, 3, size, size] <-> [size * size * 3, out]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of ours: the hub keys it is made of (several: stacked on a layer axis) and the transform."""

    path: str
    keys: tuple[str, ...]
    transform: Transform
    stacked: bool = False


def layer_tensors(path: str, key: str, layer: list[Tensor], numbers: range | int) -> list[Tensor]:
    """A layer's tensors for a stack of layers (`numbers` a range) or for one layer that stands alone."""
    if isinstance(numbers, int):
        return [Tensor(f"{path}.{t.path}", (f"{key.format(n=numbers)}.{t.keys[0]}",), t.transform) for t in layer]
    if len(numbers) == 0:
        return []
    return [
        Tensor(f"{path}.{t.path}", tuple(f"{key.format(n=n)}.{t.keys[0]}" for n in numbers), t.transform, True)
        for t in layer
    ]


class HubConfig:
    """`config.json` with dotted look-ups and errors that name file and field."""

    def __init__(self, values: Mapping[str, Any], file: Path):
        self.values, self.file = values, file

    @classmethod
    def read(cls, directory: Path) -> HubConfig:
        file = directory / "config.json"
        try:
            return cls(json.loads(file.read_text()), file)
        except FileNotFoundError:
            raise UserError(
                "no config.json here",
                file=directory,
                mend="Give the folder of a checkpoint in the hub's layout",
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON ({error})", file=file, mend="Download the file again") from None

    def get(self, field: str, default: Any) -> Any:
        """The value at a dotted path, or the default that transformers would use."""
        node: Any = self.values
        for part in field.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def require(self, field: str, *supported: Any, default: Any) -> Any:
        """The value at a dotted path; a variant that the port does not implement is refused."""
        value = self.get(field, default)
        if value not in supported:
            raise UserError(
                "this variant is not supported",
                file=self.file,
                field=field,
                value=value,
                mend=f"Supported: {', '.join(map(repr, supported))}",
            )
        return value


# transformers has written LLaVA in three ways; all are read as the hub's.
ALIASES = (
    (re.compile(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)"), ""),
    (re.compile(r"^language_model\.(?!model\.|lm_head)"), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)
IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # buffers that carry no weight


def canonical_key(key: str) -> str:
    """The hub's name of a tensor, whichever writer named it."""
    for pattern, replacement in ALIASES:
        key = pattern.sub(replacement, key)
    return key


class SafetensorsFolder(contextlib.AbstractContextManager["SafetensorsFolder"]):
    """All tensors of a folder's safetensors shards, opened lazily, under their canonical names."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self.where: dict[str, tuple[Any, str, Path]] = {}
        for file in self._files():
            try:
                handle = self._stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot be read ({error})", file=file, mend="Download the file again") from None
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                if not IGNORED.search(key):
                    self._note(handle, key, file)

    def _note(self, handle: Any, key: str, file: Path) -> None:
        name = canonical_key(key)
        if name in self.where:
            raise UserError(
                f"tensor is there twice, in {self.where[name][2].name} too", file=file, field=name, mend="Delete one"
            )
        self.where[name] = (handle, key, file)

    def _files(self) -> list[Path]:
        single = self.directory / "model.safetensors"
        if single.exists():
            return [single]
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            names = self._indexed(index)
            missing = [name for name in names if not (self.directory / name).exists()]
            if missing:
                raise UserError("shard is missing", file=index, value=missing[0], mend="Download the missing shards")
            return [self.directory / name for name in names]
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise UserError("no safetensors files here", file=self.directory, mend="Give a checkpoint's folder")
        return files

    @staticmethod
    def _indexed(index: Path) -> list[str]:
        try:
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not an index of shards ({error!r})", file=index, mend="Download the file again") from None

    def read(self, key: str) -> np.ndarray:
        handle, name, file = self.where[key]
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"cannot be read ({error})", file=file, field=key, mend="Download again") from None

    def __exit__(self, *details: object) -> None:
        self._stack.close()


def flat_paths(state: nnx.State) -> dict[str, Any]:
    """Dotted path -> variable."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}


def load_state(
    directory: Path,
    abstract: nnx.State,
    tensors: Iterable[Tensor],
    *,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
    dtype: jnp.dtype | None = None,
) -> nnx.State:
    """Fill an abstract state from a hub folder; `place(path, array)` puts a leaf on its devices."""
    leaves = flat_paths(abstract)
    plan = {tensor.path: tensor for tensor in tensors}
    unfilled = sorted(set(leaves) - set(plan))
    if unfilled:
        raise KeyError(f"the checkpoint map has no entry for {unfilled[0]}")
    put = place or (lambda path, array: jnp.asarray(array))
    with SafetensorsFolder(directory) as folder:
        known = {key for tensor in plan.values() for key in tensor.keys}
        _check_names(directory, known, set(folder.where))
        filled = {}
        for path, variable in leaves.items():
            array = _assemble(folder, plan[path], variable.get_value().shape)
            filled[path] = variable.replace(put(path, array if dtype is None else array.astype(dtype)))
    return nnx.from_flat_state([(path, filled[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(abstract)])


def _check_names(directory: Path, known: set[str], found: set[str]) -> None:
    for key in sorted(known - found):
        raise UserError(
            "tensor is missing",
            file=directory,
            field=key,
            mend="The checkpoint is incomplete or of another family",
        )
    for key in sorted(found - known):
        raise UserError(
            "tensor is unknown",
            file=directory,
            field=key,
            mend="The checkpoint is of another family or variant",
        )


def _assemble(folder: SafetensorsFolder, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    def part(key: str, wanted: tuple[int, ...]) -> np.ndarray:
        raw = folder.read(key)
        array = tensor.transform.from_hub(raw)
        if array.shape != wanted:
            raise UserError(
                f"has shape {raw.shape}, which the configuration does not allow",
                file=folder.where[key][2],
                field=key,
                mend="config.json and weights must be of one checkpoint",
            )
        return array

    if not tensor.stacked:
        return np.ascontiguousarray(part(tensor.keys[0], shape))
    out: np.ndarray | None = None
    for number, key in enumerate(tensor.keys):
        array = part(key, shape[1:])
        if out is None:
            out = np.empty(shape, array.dtype)
        out[number] = array
    assert out is not None
    return out


def hub_arrays(state: nnx.State, tensors: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """The state's leaves under the hub's names and shapes."""
    leaves = flat_paths(state)
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        value = np.asarray(leaves[tensor.path].get_value())
        parts = value if tensor.stacked else [value]
        for key, part in zip(tensor.keys, parts, strict=True):
            arrays[key] = np.ascontiguousarray(tensor.transform.to_hub(part))
    return arrays


def save_hub(directory: Path, state: nnx.State, tensors: Iterable[Tensor], dtype: jnp.dtype | None = None) -> None:
    """Write `model.safetensors` in the hub's layout (atomically: a torn file never has the final name)."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "model.safetensors.partial"
    arrays = hub_arrays(state, tensors)
    if dtype is not None:
        arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    save_file(arrays, temporary, metadata={"format": "pt"})
    temporary.rename(directory / "model.safetensors")
