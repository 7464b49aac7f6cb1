"""Reading typed fields out of JSON, with errors that name the file, the field and the mend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError

MISSING = object()


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file; UserError where it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            file=path,
            mend="finish the run that writes it, then ask again",
        ) from error
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", file=path, mend="write it again from its run") from error


class Fields:
    """One JSON object and where it stands; every getter checks the type and raises UserError."""

    def __init__(self, content: object, file: Path, where: str = ""):
        self.file, self.where = file, where
        if not isinstance(content, dict):
            raise UserError("must be an object", file=file, field=where or "(top level)", value=content)
        self.content: dict[str, Any] = content

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def bad(self, name: str, problem: str, mend: str | None = None) -> UserError:
        return UserError(problem, file=self.file, field=self.path(name), value=self.content.get(name), mend=mend)

    def _get(self, name: str, default: object) -> Any:
        if name in self.content:
            return self.content[name]
        if default is MISSING:
            raise UserError("is missing", file=self.file, field=self.path(name), mend=f'add "{name}" to that entry')
        return default

    def text(self, name: str, default: object = MISSING) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self.bad(name, "must be a string")
        return value

    def whole(self, name: str, default: object = MISSING, least: int = 0) -> Any:
        """An integer >= `least`; `default` (where given) stands for a missing or null field."""
        value = self._get(name, default)
        if default is not MISSING and value is None:
            return default
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise self.bad(name, f"must be a whole number, at least {least}")
        return value

    def number(self, name: str, default: object = MISSING, low: float = -math.inf, high: float = math.inf) -> Any:
        """A number in [low, high]; null and NaN are read as nan, "there is no value"."""
        value = self._get(name, default)
        if value is default:
            return value
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, "must be a number or null")
        if not math.isnan(value) and not low <= value <= high:
            raise self.bad(name, f"must lie in [{low:g}, {high:g}]", "give fractions, not percents")
        return float(value)

    def items(self, name: str, default: object = MISSING) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, list):
            raise self.bad(name, "must be a list")
        return value

    def table(self, name: str, default: object = MISSING) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, dict):
            raise self.bad(name, "must be an object")
        return value

    def child(self, name: str) -> Fields:
        return Fields(self._get(name, MISSING), self.file, self.path(name))
