"""The one error that a user's mistake raises: what is wrong, where, and how to mend it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
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


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, whatever its class, says that no space is left; libraries wrap what the system said."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


@contextlib.contextmanager
def full_disk_named(file: str | Path) -> Iterator[None]:
    """A full disk under `file` becomes a UserError; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if not disk_is_full(error):
            raise
        mend = "Free some space and give the same command again: it goes on from what is finished"
        raise UserError("the disk is full", file=file, mend=mend) from error


class Interrupted(Exception):
    """A run was told to stop; what it had done is saved, and the same command goes on from there."""
