"""`csp-prep`: the command line of the preparation. Every command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from csp_jax.errors import UserError

app = typer.Typer(
    name="csp-prep",
    help="From questions about photographs to shards with buried objects.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Configs = Annotated[
    list[str], typer.Argument(help="YAML files, and settings such as pack.group=true or keywords.model='{name: rule}'")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """YAML files and `field=value` settings; UserError for anything else, or without a file."""
    files = [Path(argument) for argument in arguments if argument.endswith((".yaml", ".yml")) and "=" not in argument]
    settings = [argument for argument in arguments if "=" in argument]
    for argument in arguments:
        if Path(argument) not in files and argument not in settings:
            mend = "Give YAML files, and settings as field=value"
            raise UserError("neither a YAML file nor a setting", value=argument, mend=mend)
    if not files:
        raise UserError("no configuration is named", mend="configs/prep/ has one for every source")
    return files, settings


@app.command()
def run(
    configs: Configs,
    limit: Annotated[int, typer.Option(min=0, help="rows of the source; 0: as the configuration says")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="try a few units, say what all would cost")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="re-read everything afterwards")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start again, deleting what is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Prepare data sets; the same command goes on after an interruption, and does nothing when all is done."""
    from data_prep.config import load_prep_config

    files, settings = split_arguments(configs)
    settings += [f"limit={limit}"] if limit else []
    loaded = [(file, load_prep_config(file, settings)) for file in files]
    outs = Counter(config.out for _, config in loaded)
    for file, config in loaded:
        if outs[config.out] > 1:
            raise UserError("two configurations write there", file=file, field="out", value=config.out)
    for file, config in loaded:
        if dry_run:
            from data_prep.estimate import estimate

            _print_estimate(file, estimate(config), as_json)
            continue
        _prepare(file, config, overwrite, verify, as_json)


def _prepare(file: Path, config: Any, overwrite: bool, verify: bool, as_json: bool) -> None:
    from data_prep.run import prepare
    from data_prep.sources.registry import open_source

    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[dropped]}"),
        console=Console(stderr=True),
        disable=not config.run.progress,
        refresh_per_second=2,
    )
    total = open_source(config).count()
    total = min(total, config.limit) if total and config.limit else total or config.limit or None
    with shown:
        task = shown.add_task(config.dataset, total=total, rate="", dropped="")

        def progress(rows: int, totals: Counter[str]) -> None:
            speed = shown.tasks[task].speed
            rate = f"{speed:.1f}/s" if speed else ""
            shown.update(task, completed=rows, rate=rate, dropped=drops(totals))

        done = prepare(config, overwrite=overwrite, progress=progress)
    if verify:
        from data_prep.verify import verify as verify_all

        verify_all(done.directory)
    _print_done(file, done, verify, as_json)


def drops(totals: Counter[str]) -> str:
    """`12 dropped (no_object 9, gray_image 3)`."""
    if not totals["rejected"]:
        return ""
    reasons = Counter({n.partition(".")[2]: c for n, c in totals.items() if n.startswith("rejected.")})
    return f"{totals['rejected']} dropped ({', '.join(f'{name} {count}' for name, count in reasons.most_common(3))})"


def _print_done(file: Path, done: Any, verified: bool, as_json: bool) -> None:
    totals = done.totals
    if as_json:
        print(json.dumps({"config": str(file), "out": str(done.directory), "totals": dict(sorted(totals.items()))}))
        return
    state = "was finished before" if done.repeated else "finished"
    state += f", {done.resumed} records were there already" if done.resumed and not done.repeated else ""
    typer.echo(f"{done.directory}: {state}{', verified' if verified else ''}")
    typer.echo(
        f"  {totals['rows']} rows = {totals['questions']} questions packed + {totals['rejected']} rejected"
        f" + {totals['merged']} merged; {totals['records']} records, {totals['items']} items"
    )
    for name, count in sorted(totals.items()):
        kind, _, what = name.partition(".")
        if kind in ("rejected", "counted") and what:
            typer.echo(f"  {kind:9} {what:24} {count}")
    for name, clock in done.clocks.of.items():
        typer.echo(f"  {name:9} {clock.seconds:8.1f} s {clock.rate:10.1f} units/s")


def _print_estimate(file: Path, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"config": str(file), **found}))
        return
    table = Table(title=f"{file}: nothing was written")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if value is not None else "?")
    Console().print(table)


@app.command()
def verify(
    shards: Annotated[Path, typer.Argument(help="a prepared data set's folder")], as_json: AsJson = False
) -> None:
    """Re-read everything: checksums, records, pictures, masks, ids, splits, and that the counts add up."""
    from data_prep.verify import verify as verify_all

    totals = verify_all(shards)
    if as_json:
        print(json.dumps(dict(sorted(totals.items()))))
        return
    typer.echo(
        f"{shards}: {totals['records']} records, {totals['items']} items, {totals['rejected']} rejects: all holds"
    )


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and a status that is not 0; `--debug` shows the trace."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        if debug:
            traceback.print_exc()
        console.print(f"csp-prep: {error}", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("csp-prep: interrupted; the same command goes on from what is finished", markup=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
