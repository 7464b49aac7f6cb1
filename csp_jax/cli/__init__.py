"""`csp`: the command line. Every command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import logging
import sys
import traceback

from rich.console import Console

from csp_jax.cli.app import app
from csp_jax.errors import Interrupted, UserError

# The order of the help:
# isort: off
from csp_jax.cli import runs, bench, questions, checkpoints, results
# isort: on

__all__ = ["app", "bench", "checkpoints", "main", "questions", "results", "runs"]

INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command again


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and a status that is not 0; `--debug` shows the trace."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    error_console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not debug:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # checkpoint writers log the trace of what we report
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        if debug:
            traceback.print_exc()
        error_console.print(f"csp: {error}", style="red", markup=False)
        sys.exit(2)
    except Interrupted as error:
        error_console.print(f"csp: {error}", markup=False)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        error_console.print("csp: interrupted; the same command goes on from what is finished", markup=False)
        sys.exit(130)
    except OSError as error:
        if debug:
            traceback.print_exc()
        error_console.print(f"csp: {error}. Free some space or correct the path", style="red", markup=False)
        sys.exit(2)
