"""`csp`: the command line. Every command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from csp_jax import __version__
from csp_jax.errors import Interrupted, UserError

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
INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command again


def _configure_jax() -> None:
    """Compiled programs are kept on disk, so that a second run starts fast."""
    import jax

    cache = Path.home() / ".cache" / "csp_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _print_rows(rows: list[dict[str, Any]], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(rows, indent=1, default=str, allow_nan=False))
        return
    table = Table(title=escape(title))
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


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

    _configure_jax()
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
    _print_rows(rows, False, "Where the time went")
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
    from csp_jax.train.loop import train as run

    values = load_config(TrainConfig, config, settings or [])
    _configure_jax()
    chain = [(config, values)]
    while chain[0][1].after:
        before = Path(chain[0][1].after)
        chain.insert(0, (before, load_config(TrainConfig, before)))
    for file, stage in chain:
        typer.echo(f"{file}: {run(stage, title=file.stem)}")


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, or `world`")],
    shards: Annotated[Path, typer.Argument(help="a data set's folder")],
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int, typer.Option(min=0, help="records; 0: all")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="records in a batch")] = 4,
    reading: Annotated[str, typer.Option(help="expected or greedy")] = "expected",
    shots: Annotated[int, typer.Option(min=0, help="examples before each confidence query")] = 0,
    shots_split: Annotated[str, typer.Option(help="the split that the examples come from")] = "train",
    out: Annotated[Path | None, typer.Option(help="save what was said as npz")] = None,
    adapter: AdapterFolder = None,
    prompts: PromptsFile = "",
    as_json: AsJson = False,
) -> None:
    """Ask a model for its confidence in every candidate answer of a split, and score it."""
    import jax

    from csp_jax.config import ParallelConfig
    from csp_jax.data.shards import ShardSource
    from csp_jax.evaluate import evaluate, example_shots
    from csp_jax.families.registry import open_family
    from csp_jax.models.registry import load_model
    from csp_jax.results import READINGS, result_rows
    from csp_jax.sharding import make_mesh
    from csp_jax.train.loop import checkpoint_folder, read_prompts

    if reading not in READINGS:
        raise UserError("no such reading", field="--reading", value=reading, mend=f"Use {' or '.join(READINGS)}")
    _configure_jax()
    folder, source = checkpoint_folder(model), ShardSource(shards, split)
    answers = evaluate(
        load_model(folder, adapter=adapter),
        open_family(folder),
        read_prompts(prompts),
        source,
        make_mesh(ParallelConfig(), jax.local_devices()),
        limit=limit,
        rows=rows,
        shots=example_shots(ShardSource(shards, shots_split), shots) if shots else (),
    )
    if out:
        answers.save(out)
    found = result_rows([answers], None, model=folder.name, recipe="", reading=reading)
    if not as_json:
        found = [
            row
            for row in found
            if row["metric"] in ("accuracy", "f1", "auc_correctness", "brier", "ece", "direct_accuracy")
        ]
    _print_rows(found, as_json, f"{folder} on {split}")


PRECISIONS = ("stored", "float32", "float16", "bfloat16")


def _precision(name: str) -> Any:
    import jax.numpy as jnp

    if name not in PRECISIONS:
        raise UserError("no such precision", field="--dtype", value=name, mend=f"Use {', '.join(PRECISIONS)}")
    return None if name == "stored" else jnp.dtype(name)


@app.command("import")
def import_command(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in the hub's layout: safetensors or .bin")],
    out: Annotated[Path, typer.Argument(help="a new folder, weights stacked and ready for any mesh")],
    dtype: Annotated[str, typer.Option(help="stored (as in the files), float32, float16 or bfloat16")] = "stored",
) -> None:
    """Turn a checkpoint of the hub into one that starts faster; all commands read both."""
    from csp_jax.models.registry import import_model
    from csp_jax.train.loop import checkpoint_folder

    import_model(checkpoint_folder(str(checkpoint)), out, _precision(dtype))
    typer.echo(f"{dtype} checkpoint: {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    out: Annotated[Path, typer.Argument(help="a new folder in the hub's layout")],
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or stored (as in the files)")] = "stored",
    adapter: AdapterFolder = None,
) -> None:
    """Write a checkpoint in the hub's layout, in the precision asked for; adapters are merged."""
    from csp_jax.models.registry import load_model
    from csp_jax.train.checkpoint import export_model
    from csp_jax.train.loop import checkpoint_folder

    precision = _precision(dtype)
    if out.exists():
        raise UserError("is there already", file=out, mend="Choose another folder or delete it")
    folder = checkpoint_folder(str(checkpoint))
    export_model(out, load_model(folder, dtype=precision, adapter=adapter), folder, precision)
    typer.echo(f"{dtype} checkpoint: {out}")


@app.command()
def parity(
    folders: Annotated[list[Path], typer.Argument(help="folders of a checkpoint, inputs and reference outputs")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the largest differences as a Markdown table")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare ports with their originals, case by case; the status is 1 where a difference is past its limit."""
    from csp_jax.parity.checks import parity as compare
    from csp_jax.parity.checks import summary

    _configure_jax()
    checks = compare(folders)
    rows = [check.row() for check in checks]
    if not as_json:
        rows = [{**row, "difference": "" if row["difference"] is None else f"{row['difference']:.2g}"} for row in rows]
        rows = [{**row, "limit": f"{row['limit']:.0e}" if row["limit"] else "0"} for row in rows]
    if markdown:
        typer.echo(summary(checks))
    else:
        _print_rows(rows, as_json, "Against the originals")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="a picture")],
    question: Annotated[str, typer.Argument(help="a question about it")],
    model: Annotated[str, typer.Option(help="a checkpoint folder, or `world`")] = "world",
    adapter: AdapterFolder = None,
    prompts: PromptsFile = "",
    as_json: AsJson = False,
) -> None:
    """Answer a question about a picture and say how sure the model is."""
    from csp_jax.ask import ask_picture
    from csp_jax.train.loop import checkpoint_folder, read_prompts

    _configure_jax()
    answer = ask_picture(checkpoint_folder(model), image, question, read_prompts(prompts), adapter)
    if as_json:
        _print_rows([answer], True, "")
        return
    says = "does not say how sure it is" if answer["said"] is None else f"says {answer['said']:.0%}"
    typer.echo(f"{answer['answer']}  (confidence {answer['confidence']:.0%}; {says})")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, or `world`")],
    source: Annotated[Path, typer.Argument(help='a data set\'s folder, or lines of {"id", "image", "question"}')],
    out: Annotated[Path, typer.Argument(help="the file of answers, one JSON object a question")],
    split: Annotated[str, typer.Option(help="of a data set")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="questions; 0: all")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="answers to each question")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="draw from the likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens of this total probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="another one gives other answers")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="questions in a batch")] = 8,
    dtype: Annotated[str, typer.Option(help="of the computation: float32 or bfloat16")] = "float32",
    prompts: PromptsFile = "",
) -> None:
    """Sample answers to questions about pictures; the same command goes on after an interruption."""
    from itertools import islice

    from rich.progress import Progress

    from csp_jax.sample import Answerer, Setting, questions, sample_file
    from csp_jax.train.loop import checkpoint_folder, read_prompts

    if dtype not in ("float32", "bfloat16"):
        raise UserError("no such precision", field="--dtype", value=dtype, mend="Use float32 or bfloat16")
    _configure_jax()
    asked = list(islice(questions(source, split), limit or None))
    wanted = read_prompts(prompts).answer
    setting = Setting(model, samples, seed, max_tokens, temperature, top_k, top_p, wanted, dtype)
    answerer = Answerer(checkpoint_folder(model), setting, rows)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batches", total=None)
        now = sample_file(answerer, asked, out, lambda done, total: bar.update(task, completed=done, total=total))
    typer.echo(f"{samples} answers to each of {len(asked)} questions ({now} of them answered now): {out}")


@app.command()
def plan(
    configs: Annotated[list[Path], typer.Argument(help="trainings' YAMLs")],
    target: Annotated[list[str], typer.Option(help="card:hosts x devices, such as a100-80g:1x8, 8x8, v5e:4x8")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value, such as batch.rows=32")] = None,
    only: Annotated[bool, typer.Option("--only", help="as configured; try nothing else")] = False,
    write: Annotated[Path | None, typer.Option(help="folder for the recommended configurations")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file to keep the rows in")] = None,
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
    plans = run.make_plans(configs, target, overrides=settings or [], packages=packages, only=only, done=done, say=say)
    if as_json:
        _print_rows([row for made in plans for row in made.rows()], True, "")
    if not all(made.fits for made in plans):
        raise typer.Exit(1)


@app.command()
def metrics(
    file: Annotated[Path, typer.Argument(help='lines of {"id", "confidence", "correct"}')],
    bins: Annotated[int, typer.Option(help="bins of equal width")] = 10,
    preset: Annotated[str, typer.Option(help="top-label, csp-classwise, torchmetrics or netcal")] = "top-label",
    percent: Annotated[bool, typer.Option("--percent", help="plain numbers are percents")] = False,
    as_json: AsJson = False,
) -> None:
    """Every calibration metric of any model's answers."""
    from csp_jax.calibration.answers_file import metrics_of_file

    found = metrics_of_file(file, bins=bins, preset=preset, percent=percent)
    if as_json:
        _print_rows([_without_nan(found)], True, "")
        return
    intervals = found["intervals"]
    rows = [
        {
            "metric": name,
            "value": value,
            "low": intervals.get(name, ("", ""))[0],
            "high": intervals.get(name, ("", ""))[1],
        }
        for name, value in found.items()
        if isinstance(value, int | float)
    ]
    _print_rows(rows, False, found["convention"])


def _without_nan(value: Any) -> Any:
    """Undefined numbers as null: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder with results.json")]) -> None:
    """Draw a run folder's page again."""
    from csp_jax.report import build_report

    typer.echo(f"report: {build_report(run)}")


@app.command()
def doctor(
    config: Annotated[bool, typer.Option("--config", help="list every field of a training's configuration")] = False,
) -> None:
    """Versions and devices; with --config every field of a training's configuration, its type and default."""
    if config:
        from csp_jax.config import TrainConfig, describe_fields

        _print_rows(describe_fields(TrainConfig), False, "csp train")
        return
    from importlib.metadata import version

    import jax

    names = (
        "csp_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "numpy",
    )
    rows = [{"what": name, "found": version(name)} for name in names]
    rows.append({"what": "devices", "found": ", ".join(str(device) for device in jax.devices())})
    _print_rows(rows, False, f"csp_jax {__version__}")


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
