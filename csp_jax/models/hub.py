"""Checkpoints in the hub's layout: strict reading into a model's leaves, and writing them back.

A family describes its layout as data (see `checkpoint_map`). Reading is streamed, one leaf at a time in the precision
and placement asked for; anything unknown, missing or misshapen is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csp_jax.errors import UserError
from csp_jax.models.checkpoint_map import Tensor
from csp_jax.models.tensor_files import TensorFile, write_safetensors


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
            self.refuse(field, value, f"Supported: {', '.join(map(repr, supported))}")
        return value

    def refuse(self, field: str, value: Any, mend: str) -> NoReturn:
        """The error that names a variant which the port does not implement."""
        raise UserError("this variant is not supported", file=self.file, field=field, value=value, mend=mend)


IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # buffers that carry no weight
Aliases = Sequence[tuple[re.Pattern[str], str]]


def canonical_key(key: str, aliases: Aliases) -> str:
    """The hub's name of a tensor, whichever writer named it."""
    for pattern, replacement in aliases:
        key = pattern.sub(replacement, key)
    return key


class HubFolder:
    """All tensors of a folder's weight files under their canonical names, read when asked for."""

    def __init__(self, directory: Path, aliases: Aliases = ()):
        self.directory = directory
        self.where: dict[str, tuple[TensorFile, str]] = {}
        for file in map(TensorFile, weight_files(directory)):
            for key in file.entries:
                if not IGNORED.search(key):
                    self._note(file, key, canonical_key(key, aliases))

    def _note(self, file: TensorFile, key: str, name: str) -> None:
        if name in self.where:
            raise UserError(
                f"tensor is there twice, in {self.where[name][0].file.name} too",
                file=file.file,
                field=name,
                mend="Delete one",
            )
        self.where[name] = (file, key)

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        file, key = self.where[name]
        return file.read(key)

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self.where[name]
        return file.entries[key].shape

    def check_names(self, known: set[str], duplicates: Mapping[str, str]) -> None:
        """UserError names a tensor that is missing, unknown, or no duplicate of what it should repeat."""
        found = set(self.where) - set(duplicates)
        for problem, keys, mend in (
            ("missing", known - found, "The checkpoint is incomplete or of another family"),
            ("unknown", found - known, "The checkpoint is of another family or variant"),
        ):
            if keys:
                raise UserError(f"tensor is {problem}", file=self.directory, field=min(keys), mend=mend)
        for copy, original in duplicates.items():
            if copy in self.where and not np.array_equal(self.read(copy), self.read(original)):
                raise UserError(f"differs from {original}", file=self.directory, field=copy, mend="They must be one")


def weight_files(directory: Path) -> list[Path]:
    """A folder's weight files: safetensors before `.bin`, one file before the shards of an index."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = directory / f"{stem}.{suffix}", directory / f"{stem}.{suffix}.index.json"
        if single.exists():
            return [single]
        if index.exists():
            names = _indexed(index)
            missing = [name for name in names if not (directory / name).exists()]
            if missing:
                raise UserError("shard is missing", file=index, value=missing[0], mend="Download the missing shards")
            return [directory / name for name in names]
        files = sorted(directory.glob(f"{stem}*.{suffix}"))
        if files:
            return files
    raise UserError("no safetensors or .bin files here", file=directory, mend="Give a checkpoint's folder")


def companions(directory: Path) -> list[Path]:
    """A folder's files beside its weights and adapter: configuration, tokenizer, limits of pictures."""
    weights = re.compile(r"\.(safetensors|bin)(\.|$)|^adapter_config\.json$")
    return sorted(file for file in directory.iterdir() if file.is_file() and not weights.search(file.name))


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not an index of shards ({error!r})", file=index, mend="Download the file again") from None


def flat_paths(state: nnx.State) -> dict[str, Any]:
    """Dotted path -> variable."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}


def path_pattern(text: str, names: Iterable[str], *, field: str, mend: str) -> re.Pattern[str]:
    """A regular expression that is matched from the beginning of names; UserError if it is none or matches none."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"not a regular expression ({error})", field=field, value=text) from None
    if not any(pattern.match(name) for name in names):
        raise UserError("nothing matches", field=field, value=text, mend=mend)
    return pattern


Place = Callable[[nnx.Variable, np.ndarray], jax.Array]


def load_state(
    folder: HubFolder,
    abstract: nnx.State,
    tensors: Iterable[Tensor],
    *,
    duplicates: Mapping[str, str] | None = None,
    place: Place | None = None,
    dtype: jnp.dtype | None = None,
) -> nnx.State:
    """Fill an abstract state from a hub folder, leaf by leaf.

    `place(variable, array)` puts a leaf on its devices; beside what it has placed there is one leaf in host memory,
    in its final precision, and one tensor of a file. `duplicates`: keys that may repeat another one.
    """
    leaves = flat_paths(abstract)
    plan = {tensor.path: tensor for tensor in tensors}
    unfilled = sorted(set(leaves) - set(plan))
    if unfilled:
        raise KeyError(f"the checkpoint map has no entry for {unfilled[0]}")
    put = place or (lambda variable, array: jnp.asarray(array))
    folder.check_names({key for tensor in plan.values() for key in tensor.keys}, duplicates or {})
    filled = {}
    for path, variable in leaves.items():
        leaf = put(variable, _assemble(folder, plan[path], variable.get_value().shape, dtype))
        filled[path] = variable.replace(jax.block_until_ready(leaf))  # or the next one would wait beside it in memory
    return nnx.from_flat_state([(path, filled[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(abstract)])


def _assemble(folder: HubFolder, tensor: Tensor, shape: tuple[int, ...], dtype: jnp.dtype | None) -> np.ndarray:
    """A leaf in memory of its own."""
    wanted = shape[1:] if tensor.stacked else shape
    out: np.ndarray | None = None
    for number, key in enumerate(tensor.keys):
        raw = folder.read(key)
        try:
            part = tensor.transform.from_hub(raw if tensor.rows is None else tensor.rows.take(raw))
        except ValueError:
            part = raw
        if part.shape != wanted:
            raise UserError(
                f"has shape {raw.shape}, which the configuration does not allow",
                file=folder.where[key][0].file,
                field=key,
                mend="config.json and weights must be of one checkpoint",
            )
        if out is None:
            out = np.empty(shape, part.dtype if dtype is None else dtype)
        out[number if tensor.stacked else ...] = part
    assert out is not None
    return out


# --- writing ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    """A leaf, or one layer of a stacked leaf, that goes into a hub tensor."""

    tensor: Tensor
    variable: nnx.Variable
    number: int

    def array(self, dtype: jnp.dtype | None) -> np.ndarray:
        value = self.variable.get_value()
        array = np.asarray(value[self.number] if self.tensor.stacked else value)
        return self.tensor.transform.to_hub(array if dtype is None else array.astype(dtype))


def _parts(state: nnx.State, tensors: Iterable[Tensor]) -> dict[str, list[_Part]]:
    leaves = flat_paths(state)
    parts: dict[str, list[_Part]] = {}
    for tensor in tensors:
        for number, key in enumerate(tensor.keys):
            parts.setdefault(key, []).append(_Part(tensor, leaves[tensor.path], number))
    return parts


def _hub_array(parts: list[_Part], dtype: jnp.dtype | None) -> np.ndarray:
    first, rows = parts[0].array(dtype), parts[0].tensor.rows
    if rows is None:
        return first
    whole = np.empty((rows.blocks * rows.width, *first.shape[1:]), first.dtype)
    for part in parts:
        assert part.tensor.rows is not None
        part.tensor.rows.put(whole, part.array(dtype))
    return whole


def hub_arrays(state: nnx.State, tensors: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """The state's leaves under the hub's names and shapes."""
    return {key: np.ascontiguousarray(_hub_array(parts, None)) for key, parts in _parts(state, tensors).items()}


def differing_tensors(folder: HubFolder, state: nnx.State, tensors: Iterable[Tensor]) -> int:
    """How many tensors of a folder are not, byte for byte, what would be written from a state that was read from it."""
    count = 0
    for key, parts in _parts(state, tensors).items():
        stored = folder.read(key)
        count += np.ascontiguousarray(_hub_array(parts, stored.dtype)).tobytes() != stored.tobytes()
    return count


def save_hub(
    directory: Path,
    state: nnx.State,
    tensors: Iterable[Tensor],
    dtype: jnp.dtype | None = None,
    *,
    duplicates: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the hub's layout, tensor by tensor: `model.safetensors`, or shards of `shard_bytes` and their index.

    A torn file never has the final name. `duplicates`: keys that repeat another one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = _parts(state, tensors)
    parts |= {copy: parts[original] for copy, original in (duplicates or {}).items()}
    sizes = {key: _announce(key, some, dtype) for key, some in parts.items()}
    shards = list(_shards(sizes, shard_bytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    )
    for name, keys in zip(names, shards):
        temporary = directory / f"{name}.partial"
        entries = [(key, *sizes[key], functools.partial(_hub_array, parts[key], dtype)) for key in keys]
        write_safetensors(temporary, entries)
        temporary.rename(directory / name)
    if len(shards) > 1:
        where = {key: name for name, keys in zip(names, shards) for key in keys}
        total = sum(int(np.prod(shape)) * kind.itemsize for kind, shape in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _announce(key: str, parts: list[_Part], dtype: jnp.dtype | None) -> tuple[np.dtype, tuple[int, ...]]:
    """A hub tensor's dtype and shape, without fetching its values."""
    part = parts[0]
    value = part.variable.get_value()
    shape = value.shape[1:] if part.tensor.stacked else value.shape
    kind = np.dtype(value.dtype if dtype is None else dtype)
    shape = part.tensor.transform.to_hub(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    rows = part.tensor.rows
    if rows is None:
        return kind, shape
    covered = sum(p.tensor.rows.stop - p.tensor.rows.start for p in parts if p.tensor.rows is not None)
    if covered != rows.width:
        raise KeyError(f"the checkpoint map covers {covered} of {rows.width} rows of {key}")
    return kind, (rows.blocks * rows.width, *shape[1:])


def _shards(sizes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], limit: int) -> Iterator[list[str]]:
    """Keys in the map's order, cut where a shard would exceed the limit."""
    shard: list[str] = []
    used = 0
    for key, (kind, shape) in sizes.items():
        size = int(np.prod(shape)) * kind.itemsize
        if shard and used + size > limit:
            yield shard
            shard, used = [], 0
        shard.append(key)
        used += size
    yield shard
