"""Sealed checkpoints: a folder is picked up only if every file in it is there, as long and with the same checksum.

The seal is written last, just before the folder gets its final name: a checkpoint that was torn by a kill has no final
name, and one that was copied in part has no seal or one that does not agree with its files.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

SEAL = "seal.json"
UNFINISHED = "*.orbax-checkpoint-tmp*"
OUTSIDE = "_CHECKPOINT_METADATA"  # gets the time at which the folder was named
_CHUNK = 1 << 22


def seal(folder: Path) -> None:
    """Note size and CRC-32 of every file of a finished checkpoint."""
    values = {name: [file.stat().st_size, _checksum(file)] for name, file in _files(folder)}
    temporary = folder / f"{SEAL}.partial"
    temporary.write_text(json.dumps(values, indent=0))
    temporary.rename(folder / SEAL)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    try:
        wanted = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return f"it has no {SEAL}: its writing or copying did not come to an end"
    except ValueError:
        return f"its {SEAL} is cut"
    here = dict(_files(folder))
    for name, (size, checksum) in wanted.items():
        if name not in here:
            return f"{name} is missing"
        if here[name].stat().st_size != size:
            return f"{name} has {here[name].stat().st_size} of {size} bytes"
        if _checksum(here[name]) != checksum:
            return f"{name} is not what was written"
    return None


def set_aside(directory: Path) -> list[str]:
    """Move what must not be picked up out of the way; says what and why.

    The newest checkpoint and those before it until one is whole; what was never finished is deleted.
    """
    said = []
    for folder in directory.glob(UNFINISHED):
        shutil.rmtree(folder, ignore_errors=True)
        said.append(f"checkpoint {folder.name.split('.')[0]} was never finished: deleted")
    for folder in sorted(_steps(directory), key=lambda folder: -int(folder.name)):
        problem = flaw(folder)
        if problem is None:
            break
        place = directory.with_name(f"{directory.name}-torn") / folder.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(folder, place)
        said.append(f"checkpoint {folder.name} is not picked up: {problem}; moved to {place}")
    return said


def _steps(directory: Path) -> Iterator[Path]:
    return (folder for folder in directory.glob("*") if folder.name.isdecimal() and folder.is_dir())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith((SEAL, OUTSIDE)):
            yield str(file.relative_to(folder)), file


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def seal_unfinished(directory: Path) -> None:
    """Seal the checkpoint that is about to get its final name."""
    for folder in directory.glob(UNFINISHED):
        seal(folder)
