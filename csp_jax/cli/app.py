"""The application that every command joins, the options that several of them have, and how rows are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from csp_jax.errors import UserError

app = typer.Typer(
    name="csp",
    help="Make vision-language models say how sure they are, and be right about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PromptsFile = Annotated[str, typer.Option("--prompts", help="a YAML file of prompts")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings such as optimizer.learning_rate=1e-5")]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", help="an adapter (PEFT) to put on the model")]
AsJson = Annotated[bool, typer.Option("--json", help="print a JSON array with one object a row")]


def check_choice(option: str, what: str, value: str, choices: Iterable[str]) -> None:
    """UserError unless an option's value is one of its choices."""
    if value not in choices:
        raise UserError(f"no such {what}", field=option, value=value, mend=f"Use {' or '.join(choices)}")


def configure_jax() -> None:
    """Compiled programs are kept on disk, so that a second run starts fast."""
    import jax

    cache = Path.home() / ".cache" / "csp_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def print_rows(rows: list[dict[str, Any]], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(rows, indent=1, default=str, allow_nan=False))
        return
    table = Table(title=escape(title))
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
