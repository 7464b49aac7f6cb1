"""The one error that a user's mistake raises: what is wrong, where, and how to mend it."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave (file, field, value), with the way to mend it.

    The command line prints it as one line and exits with a non-zero status; `--debug` shows the traceback.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        field: str | None = None,
        value: object = None,
        mend: str | None = None,
    ):
        self.problem, self.file, self.field, self.value, self.mend = problem, file, field, value, mend
        where = " ".join(
            part
            for part in (
                f"{file}:" if file is not None else "",
                f"{field}" if field is not None else "",
                f"= {value!r}:" if value is not None else (":" if field is not None else ""),
            )
            if part
        ).replace(" :", ":")
        text = f"{where} {problem}" if where else problem
        super().__init__(f"{text}. {mend}" if mend else text)


class Interrupted(Exception):
    """A run was told to stop; what it had done is saved, and the same command goes on from there."""
