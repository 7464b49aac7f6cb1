"""Runs a preparation in a process of its own, to be killed: from outside, or by itself at a chosen moment.

prep_child.py run SOURCE OUT [JSON]     the run, as often as it takes, with settings
prep_child.py each SOURCE OUT WHOLE     killed at its n-th touch of the disk, taken up again, for every n
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from prep_runs import config_of, tree

from csp_jax.errors import UserError
from data_prep.run import prepare

TOUCHES = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")
NEVER = 1 << 30
SETTINGS = {"batch": 4, "pack": {"splits": {"train": 0.7, "test": 0.3}, "records_per_shard": 3}}


def run(source: Path, out: Path, **settings: object) -> None:
    prepare(config_of("folder", source, out, **{**SETTINGS, **settings}))


class Fuse:
    """Kills this process at its n-th touch of the disk, just before or (odd n) just after it."""

    def __init__(self, number: int):
        self.number, self.count = number, 0

    def arm(self) -> None:
        for name in TOUCHES:
            setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, function):
        def touched(*arguments, **options):
            self.count += 1
            if self.count == self.number // 2 and self.number % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **options)
            finally:
                if self.count == self.number // 2 and self.number % 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        return touched


def run_and_die(source: Path, out: Path, number: int) -> bool:
    """One run in a fork with a fuse; True if it came to its end. This process itself starts no threads."""
    child = os.fork()
    if child == 0:
        Fuse(number).arm()
        try:
            run(source, out)
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, f"fuse {number}: {status}"
    return True


def each(source: Path, out: Path, whole: Path) -> None:
    truth = tree(whole)
    number = 2
    while True:
        shutil.rmtree(out, ignore_errors=True)
        finished = run_and_die(source, out, number)
        # killed again a few touches later, then left alone
        if number % 3 == 0:
            run_and_die(source, out, number % 7 + 2)
        assert run_and_die(source, out, NEVER)
        found = tree(out)
        assert found.keys() == truth.keys(), f"fuse {number}: {found.keys() ^ truth.keys()}"
        assert found == truth, f"fuse {number}: {[name for name in truth if found[name] != truth[name]]}"
        if finished:
            break
        number += 1
    print(f"killed at {number - 2} moments")


if __name__ == "__main__":
    what, source, out, *more = sys.argv[1:]
    if what == "run":
        settings = {"batch": 16, "pack": {"splits": {"train": 0.9, "test": 0.1}, "records_per_shard": 50}}
        run(Path(source), Path(out), **(json.loads(more[0]) if more else settings))
    else:
        each(Path(source), Path(out), Path(more[0]))
