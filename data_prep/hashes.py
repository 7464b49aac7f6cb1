"""One hash of anything that JSON can hold."""

from __future__ import annotations

import hashlib
import json


def hash_of(values: object) -> str:
    """A SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
