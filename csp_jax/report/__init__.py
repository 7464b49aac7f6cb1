"""The pages that show what a run found: `build_report` of a whole evaluation, `build_training_report` of one training.

Each writes one self-contained HTML file.
"""

from pathlib import Path

from csp_jax.report.page import build_report
from csp_jax.report.training import build_training_report

__all__ = ["build_any_report", "build_report", "build_training_report"]


def build_any_report(run_dir: Path) -> Path:
    """The page of a run folder: that of a training where there are metrics and no results."""
    training = (run_dir / "metrics.jsonl").exists() and not (run_dir / "results.json").exists()
    return (build_training_report if training else build_report)(run_dir)
