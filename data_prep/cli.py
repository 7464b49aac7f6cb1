"""`csp-prep`: the command line of the preparation. Every command imports what it needs when it runs."""

from __future__ import annotations

import json
import math
import sys
import time
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
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
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

    total = open_source(config).count()
    with Meter(config.dataset, min(total, config.limit or total), config.run.progress) as meter:
        done = prepare(config, overwrite=overwrite, progress=meter)
    if verify:
        from data_prep.verify import verify as verify_all

        verify_all(done.directory)
    _print_done(file, done, verify, as_json)


class Meter:
    """How far a run is: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, name: str, total: int, shown: bool):
        console = Console(stderr=True)
        self.name, self.total, self.lines = name, total, shown and not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[dropped]}"),
            console=console,
            disable=not shown or not console.is_terminal,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(name, total=total, rate="", dropped="")
        self._start: tuple[float, int] | None = None
        self._said = 0.0

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def __call__(self, rows: int, totals: Counter[str]) -> None:
        """Show the rows that are through; those of an earlier run count as done, not as fast."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._said = (now, rows), now
            self._bar.reset(self._task, completed=rows)
        began, before = self._start
        speed = (rows - before) / (now - began) if now > began else 0.0
        self._bar.update(self._task, completed=rows, rate=f"{speed:.1f}/s", dropped=drops(totals))
        if self.lines and now - self._said > LINE_EVERY:
            self._said = now
            left = (self.total - rows) / speed / 3600 if speed else math.inf
            line = f"{self.name}: {rows} of {self.total} rows, {speed:.1f}/s, {left:.1f} h left, {drops(totals)}"
            print(line.rstrip(", "), file=sys.stderr, flush=True)


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


@app.command()
def inspect(
    shards: Annotated[Path, typer.Argument(help="a data set's folder")],
    split: Annotated[str, typer.Option()] = "train",
    out: Annotated[Path | None, typer.Option(help="the page; unset: inspect-SPLIT.html in the folder")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="pictures on the contact sheet")] = 24,
) -> None:
    """Make a page: contact sheet with boxes, outlines and noise, mask areas, keywords, drop reasons."""
    from data_prep.inspect import page

    file = out or shards / f"inspect-{split}.html"
    file.write_text(page(shards, split, pictures), encoding="utf-8")
    typer.echo(f"page: {file}")


@app.command()
def keywords(
    configs: Configs,
    limit: Annotated[int, typer.Option(min=0, help="rows of the source; 0: as the configuration says")] = 0,
    show: Annotated[int, typer.Option(min=0, help="answers to print")] = 20,
    as_json: AsJson = False,
) -> None:
    """Ask for the keywords of a source's questions, without pictures: to choose a model or to try other prompts."""
    import dataclasses

    from data_prep.config import load_prep_config
    from data_prep.keywords.survey import survey

    files, settings = split_arguments(configs)
    for file in files:
        counts, answers = survey(load_prep_config(file, settings + ([f"limit={limit}"] if limit else [])))
        rows = [dataclasses.asdict(answer) for answer in answers]
        if as_json:
            print(json.dumps({"config": str(file), **counts, "answers": rows}))
            continue
        _print_rows(str(file), [{"what": name, "value": value} for name, value in counts.items()])
        if rows[:show]:
            _print_rows("answers", rows[:show])


@app.command()
def compare(
    truth: Annotated[Path, typer.Argument(help="a data set with true masks")],
    found: Annotated[Path, typer.Argument(help="one that was made from it with other masks")],
    split: Annotated[str, typer.Option()] = "train",
    as_json: AsJson = False,
) -> None:
    """How well the masks of one data set overlap those of another, by the size of the object."""
    from data_prep.compare import table

    _print_rows("IoU", table(truth, found, split), as_json)


@app.command()
def bench(
    configs: Annotated[
        list[str] | None, typer.Argument(help="a YAML file whose stages are timed, and settings")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="rows of the source for the stages")] = 200,
    as_json: AsJson = False,
) -> None:
    """Measure: noise, packing, both modes, both noise spaces, and with a configuration each of its stages."""
    import dataclasses

    from data_prep.benchmark import measure
    from data_prep.config import load_prep_config

    config = None
    if configs:
        files, settings = split_arguments(configs)
        config = load_prep_config(files[0], settings)
    found = dataclasses.asdict(measure(config, limit))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, rows in found.items():
        if rows:
            _print_rows(title, rows if isinstance(rows, list) else [{"what": n, "value": v} for n, v in rows.items()])


def _print_rows(title: str, rows: list[dict[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) or name == "what" else "right")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


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
