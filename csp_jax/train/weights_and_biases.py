"""The same numbers at Weights & Biases, for who wants them there."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError


def require_wandb(project: str) -> None:
    """UserError where a project is named and the package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "the package wandb is not installed",
            field="run.wandb",
            value=project,
            mend="Install it (pip install 'csp_jax[wandb]'), or leave the field empty",
        )


class Board:
    """A run there; the same one when the folder's run goes on."""

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        import wandb

        file = directory / "wandb-id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=project,
            id=file.read_text(),
            name=directory.name,
            dir=str(directory),
            config=dict(config),
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of an update; those of updates that are there already are not taken again."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
