"""Commands that make something: worlds, trainings, the demo; and the plan of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csp_jax.cli.app import AsJson, Overrides, app, configure_jax, print_rows


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="a one-minute smoke run on a fraction of the data")] = False,
    ablations: Annotated[bool, typer.Option("--ablations", help="also the paper's ablations and our controls")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="repeat the trainings with this many seeds")] = 1,
    settings: Overrides = None,
) -> None:
    """Everything from an empty folder to the report page, on the embedded world."""
    from csp_jax.config import DemoConfig, load_config
    from csp_jax.demo import Demo

    configure_jax()
    chosen = [f"seeds={list(range(seeds))}"]
    if fast:
        chosen += ["splits={train: 120, validation: 8, test: 12}", "resamples=200", "overrides=[run.steps=6]"]
    config = load_config(DemoConfig, None, [*chosen, *(settings or [])])
    console = Console(stderr=True)
    run = Demo(
        config,
        out / "fast" if fast and out == Path("runs/demo") else out,
        ablations=ablations,
        say=console.print,
    )
    page = run.run()
    rows = [{"stage": name, "seconds": seconds} for name, seconds in run.clock.seconds.items()]
    rows.append({"stage": "in all", "seconds": sum(run.clock.seconds.values())})
    print_rows(rows, False, "Where the time went")
    typer.echo(f"report: {page}")


@app.command()
def world(
    out: Annotated[Path, typer.Argument(help="folder for the shards")],
    config: Annotated[Path | None, typer.Option(help="a world's YAML, such as configs/world/world.yaml")] = None,
    base: Annotated[int, typer.Option(min=0, help="scenes to train a base on")] = 0,
    train: Annotated[int, typer.Option(min=0, help="scenes to calibrate on")] = 3000,
    validation: Annotated[int, typer.Option(min=0)] = 200,
    test: Annotated[int, typer.Option(min=0)] = 400,
    objects: Annotated[Path | None, typer.Option(help="a folder of cut-outs with alpha and captions")] = None,
    backgrounds: Annotated[Path | None, typer.Option(help="a folder of background pictures")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace splits that are there")] = False,
    settings: Overrides = None,
) -> None:
    """Render a world of scenes, masks and questions as shards; with --base also what its base starts from."""
    from rich.progress import Progress

    from csp_jax.config import load_config
    from csp_jax.world import WorldConfig, build
    from csp_jax.world.untrained import write_untrained

    chosen = list(settings or [])
    chosen += [f"objects={objects}"] if objects else []
    chosen += [f"backgrounds={backgrounds}"] if backgrounds else []
    values = load_config(WorldConfig, config, chosen)
    splits = {"base": base, "train": train, "validation": validation, "test": test}
    wanted = {name: count for name, count in splits.items() if count}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {name: bar.add_task(name, total=count) for name, count in wanted.items()}
        build(
            values,
            out,
            wanted,
            lambda split, done, total: bar.update(tasks[split], completed=done),
            overwrite=overwrite,
        )
    if base:
        write_untrained(values, out / "untrained")
    typer.echo(f"{sum(wanted.values())} scenes in {out}")


@app.command()
def train(config: Annotated[Path, typer.Argument(help="a training's YAML")], settings: Overrides = None) -> None:
    """Train as a configuration says; the same command goes on after an interruption."""
    from csp_jax.config import TrainConfig, load_config
    from csp_jax.policy import batches_for
    from csp_jax.report import build_training_report
    from csp_jax.train.hosts import is_first
    from csp_jax.train.loop import train as run

    values = load_config(TrainConfig, config, settings or [])
    configure_jax()
    chain = [(config, values)]
    while chain[0][1].after:
        before = Path(chain[0][1].after)
        chain.insert(0, (before, load_config(TrainConfig, before)))
    for file, stage in chain:
        model = run(stage, title=file.stem, batches=batches_for(stage))
        if not is_first():
            continue
        measured = (model.parent / "metrics.jsonl").exists()  # of an earlier training the model may be all that is left
        typer.echo(f"{file}: {model}" + (f", report: {build_training_report(model.parent)}" if measured else ""))


@app.command()
def plan(
    configs: Annotated[list[Path], typer.Argument(help="trainings' YAMLs")],
    target: Annotated[list[str], typer.Option(help="card:hosts x devices, such as a100-80g:1x8, 8x8, v5e:4x8")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value, such as batch.rows=32")] = None,
    only: Annotated[bool, typer.Option("--only", help="as configured; try nothing else")] = False,
    write: Annotated[Path | None, typer.Option(help="folder for the recommended configurations")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file of rows: its best begin, these join")] = None,
    packages: Annotated[Path | None, typer.Option(help="where the compilers are, if installed apart")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile the real step for machines that are not here: memory, what is sent, how fast it can be."""
    from csp_jax.plan import run

    def done(made: run.Plan) -> None:
        if out:
            run.save_rows(out, [made])
        if write:
            run.write_config(write, made)
        if not as_json:
            typer.echo(made.page())

    say = Console(stderr=True, highlight=False).print
    before = run.read_rows(out) if out else []
    plans = run.make_plans(
        configs, target, overrides=settings or [], packages=packages, only=only, before=before, done=done, say=say
    )
    if as_json:
        print_rows([row for made in plans for row in made.rows()], True, "")
    if not all(made.fits for made in plans):
        raise typer.Exit(1)
