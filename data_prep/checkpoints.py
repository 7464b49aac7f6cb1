"""Where weights lie, what they hash to, and on which device and in which precision they run."""

from __future__ import annotations

from pathlib import Path

import torch

from csp_jax.errors import UserError
from csp_jax.manifest import sha256_of
from data_prep.hashes import hash_of

WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja")


def local_folder(checkpoint: str, field: str) -> Path:
    """The folder of a checkpoint: the one that is named, or the hub's copy in the local cache or from the network."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=wanted))
    except Exception as error:  # the hub has many kinds of failure, none of which helps here
        raise UserError(
            f"no such folder, and it cannot be had from the hub ({type(error).__name__})",
            field=field,
            value=checkpoint,
            mend="Give a folder with config.json and weights in transformers' layout",
        ) from error


def hash_folder(folder: Path, names: tuple[str, ...] = ()) -> str:
    """One hash of a checkpoint's files, or of the named ones."""
    paths = [folder / name for name in names] or sorted({path for kind in WEIGHTS for path in folder.glob(kind)})
    return hash_of({path.name: sha256_of(path) for path in paths})


def choose_device(name: str, field: str) -> torch.device:
    """`auto` is the first GPU if there is one; UserError when a device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no such device ({error})", field=field, value=name, mend="Use auto") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is half precision on a GPU and single precision elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
