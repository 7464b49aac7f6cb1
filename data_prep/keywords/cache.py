"""What models said, kept on disk: asked once, whatever happens to the run."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path

from csp_jax.errors import UserError
from data_prep.keywords.interface import KeywordFinder


class Cached:
    """A finder that remembers. Answers of one batch are saved together or not at all; processes may share the file."""

    def __init__(self, finder: KeywordFinder, path: Path):
        self.finder, self.identity = finder, finder.identity
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._database.execute("pragma journal_mode=wal")
            self._database.execute("create table if not exists said (key text primary key, text text) without rowid")
        except (OSError, sqlite3.Error) as error:
            mend = "Delete the file, or set keywords.cache to another path"
            raise UserError(
                f"cannot be used as a cache ({error})", file=path, field="keywords.cache", mend=mend
            ) from None

    def _key(self, pair: tuple[str, str]) -> str:
        return hashlib.sha256(json.dumps([self.identity, *pair]).encode()).hexdigest()

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """Remembered answers, and the finder's for the rest; equal pairs are asked once."""
        keys = [self._key(pair) for pair in pairs]
        with self._lock:
            known: dict[str, str] = {}
            for key in set(keys):
                row = self._database.execute("select text from said where key = ?", (key,)).fetchone()
                if row:
                    known[key] = row[0]
            new = dict.fromkeys(key for key in keys if key not in known)
            if new:
                place = {key: index for index, key in reversed(list(enumerate(keys)))}
                answers = self.finder([pairs[place[key]] for key in new])
                known |= dict(zip(new, answers, strict=True))
                with self._database:
                    rows = [(key, known[key]) for key in new]
                    self._database.executemany("insert or replace into said values (?, ?)", rows)
        return [known[key] for key in keys]
