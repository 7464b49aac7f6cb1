"""Files of named tensors: safetensors read and written, `.bin` files of PyTorch read without running them.

Both readers know all names, dtypes and shapes from the file's head and read one tensor at a time into memory of
its own: nothing is mapped, so that reading a large checkpoint never holds more than the tensor at hand.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from csp_jax.errors import UserError

SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
LARGEST_HEAD = 100_000_000  # bytes, as the format's own readers allow


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: contiguous, from byte `start` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A file of named tensors. UserError names a file that is cut, damaged or of another kind."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.entries = safetensors_entries(file) if file.suffix == ".safetensors" else torch_entries(file)
        except DAMAGE as error:
            self._damaged(error)
        size = file.stat().st_size
        for name, entry in self.entries.items():
            if entry.start + entry.nbytes > size:
                self._damaged(ValueError(f"{name} ends behind the end of the file"))

    def _damaged(self, error: Exception) -> NoReturn:
        raise UserError(f"cannot be read ({error})", file=self.file, mend="Download the file again") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        try:
            with self.file.open("rb") as stream:
                stream.seek(entry.start)
                done = stream.readinto(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            self._damaged(error)
        if done != entry.nbytes:
            self._damaged(ValueError(f"{name} is cut"))
        return array


def safetensors_entries(file: Path) -> dict[str, Entry]:
    """The head of a safetensors file: its length, then JSON; offsets count from the head's end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise ValueError("too short for a header")
        (length,) = struct.unpack("<Q", first)
        if length > min(size - 8, LARGEST_HEAD):
            raise ValueError("the header is cut")
        head = json.loads(stream.read(length))
    entries, data = {}, 8 + length
    for name, value in head.items():
        if name == "__metadata__":
            continue
        if value["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"{name} has the type {value['dtype']}")
        begin, end = value["data_offsets"]
        entry = Entry(SAFETENSORS_TYPES[value["dtype"]], tuple(value["shape"]), data + begin)
        if entry.nbytes != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes for the shape {entry.shape}")
        entries[name] = entry
    return entries


def write_safetensors(
    file: Path, arrays: Iterable[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]
) -> None:
    """Write tensors (name, dtype, shape, how to get it) one by one in the order of their names.

    The file is byte for byte what the format's own writer makes of tensors of one precision.
    """
    ordered = sorted(arrays, key=lambda item: item[0])
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, _ in ordered:
        nbytes = math.prod(shape) * dtype.itemsize
        head[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape, make in ordered:
            array = np.ascontiguousarray(make())
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(f"announced {dtype} {shape}, made {array.dtype} {array.shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)


# --- .bin: a zip of a pickled index and raw storages -----------------------------------------------------------

TORCH_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    member: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
    """Called in place of PyTorch's function of this name: notes where a tensor lies."""
    wanted, step = [], 1
    for size in reversed(shape):
        wanted.append(step)
        step *= size
    steps = [(have, want) for have, want, size in zip(stride, reversed(wanted), shape) if size > 1]
    if not isinstance(storage, _Storage) or any(have != want for have, want in steps):
        raise pickle.UnpicklingError("a tensor is not stored in rows")
    return _Tensor(storage, int(offset), tuple(int(size) for size in shape))


class _Index(pickle.Unpickler):
    """Reads the index of a `.bin` file. Only the names below mean anything; no module is ever imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in TORCH_STORAGES:
            return TORCH_STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a table of tensors")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError("it holds more than tensors")
        return _Storage(dtype, str(key))


def torch_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a `.bin` file and where their bytes lie in it."""
    if not zipfile.is_zipfile(file):
        raise ValueError("not a zip archive; cut, or written by PyTorch before 1.6")
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        with archive.open(members["data.pkl"]) as index:
            table = _Index(index).load()
        if not isinstance(table, dict):
            raise ValueError("not a table of tensors")
        entries = {}
        for name, tensor in table.items():
            if not isinstance(tensor, _Tensor):
                raise ValueError(f"{name} is no tensor")
            info = members[f"data/{tensor.storage.member}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            dtype = tensor.storage.dtype
            entry = Entry(dtype, tensor.shape, _data_start(stream, info) + tensor.offset * dtype.itemsize)
            if tensor.offset * dtype.itemsize + entry.nbytes > info.file_size:
                raise ValueError(f"{name} is larger than its storage")
            entries[str(name)] = entry
    return entries


def _data_start(stream: Any, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose name and extra field vary in length."""
    stream.seek(info.header_offset)
    header = stream.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("a member's header is damaged")
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra
