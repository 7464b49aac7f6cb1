"""Reference folders as `csp parity` reads them, unpacked from the compressed files in tests/golden."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny import GOLDEN

FAMILIES = {
    "llava": "llava15",
    "qwen2_vl": "qwen2_vl",
    "internvl2": "internvl2",
    "phi3_vision": "phi35_vision",
    "qwen_vl": "qwen_vl_chat",
}


def unpack(name: str, target: Path) -> Path:
    """A copy of a folder of tests/golden, every `.npz` as safetensors."""
    folder = target / name
    folder.mkdir(parents=True)
    for file in (GOLDEN / name).iterdir():
        if file.suffix == ".npz":
            with np.load(file) as tensors:
                save_file(
                    {key: np.ascontiguousarray(value) for key, value in tensors.items()},
                    folder / f"{file.stem}.safetensors",
                )
        else:
            shutil.copyfile(file, folder / file.name)
    return folder
