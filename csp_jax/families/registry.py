"""The families on the host, by the name that `config.json` gives."""

from __future__ import annotations

from pathlib import Path

from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily, read_json
from csp_jax.families.internvl2 import InternVL2Host
from csp_jax.families.llava import LlavaHost
from csp_jax.families.phi3_vision import Phi3VisionHost
from csp_jax.families.qwen2_vl import Qwen2VLHost
from csp_jax.families.qwen_vl import QwenVLHost

FAMILIES: dict[str, type[HostFamily]] = {
    "llava": LlavaHost,
    "qwen2_vl": Qwen2VLHost,
    "internvl2": InternVL2Host,
    "phi3_vision": Phi3VisionHost,
    "qwen_vl": QwenVLHost,
}
# What the hub's `model_type` is called here.
HUB_NAMES = {
    "llava": "llava",
    "qwen2_vl": "qwen2_vl",
    "internvl_chat": "internvl2",
    "phi3_v": "phi3_vision",
    "qwen": "qwen_vl",
}


def family_name(model_type: object, file: Path) -> str:
    """The family that a `config.json` (`file`) names."""
    if not isinstance(model_type, str) or model_type not in HUB_NAMES:
        raise UserError(
            "no such model family",
            file=file,
            field="model_type",
            value=model_type,
            mend=f"Families: {', '.join(HUB_NAMES)}",
        )
    return HUB_NAMES[model_type]


def open_family(directory: str | Path, *, words: bool = True) -> HostFamily:
    """The host side of a checkpoint folder in the hub's layout; without `words` it needs no tokenizer."""
    directory = Path(directory)
    file = directory / "config.json"
    if not file.exists():
        raise UserError("no config.json here", file=directory, mend="Give a checkpoint's folder")
    family = FAMILIES[family_name(read_json(file).get("model_type"), file)](directory)
    if words:
        family.check_words()
    return family
