"""The page that shows what a run found: `build_report(run_dir)` writes one self-contained HTML file."""

from csp_jax.report.page import build_report

__all__ = ["build_report"]
