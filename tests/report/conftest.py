"""The run folder that the tests of the report share."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_folder import RunFolder, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "small")
