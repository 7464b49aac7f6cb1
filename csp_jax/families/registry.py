"""The families on the host, by the name that `config.json` gives."""

from __future__ import annotations

import json
from pathlib import Path

from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily
from csp_jax.families.llava import LlavaHost

FAMILIES: dict[str, type[HostFamily]] = {"llava": LlavaHost}


def open_family(directory: str | Path) -> HostFamily:
    """The host side of a checkpoint folder in the hub's layout."""
    directory = Path(directory)
    file = directory / "config.json"
    try:
        name = json.loads(file.read_text()).get("model_type")
    except FileNotFoundError:
        raise UserError("no config.json here", file=directory, mend="Give a checkpoint's folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error})", file=file, mend="Download the file again") from None
    if name not in FAMILIES:
        raise UserError(
            "no such model family",
            file=file,
            field="model_type",
            value=name,
            mend=f"Families: {', '.join(FAMILIES)}",
        )
    return FAMILIES[name](directory)  # type: ignore[call-arg]
