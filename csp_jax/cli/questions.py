"""Commands that ask a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csp_jax.cli.app import AdapterFolder, AsJson, PromptsFile, app, check_choice, configure_jax, print_rows


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, or `world`")],
    shards: Annotated[Path, typer.Argument(help="a data set's folder")],
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int, typer.Option(min=0, help="records; 0: all")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="pictures in a batch")] = 4,
    protocol: Annotated[str, typer.Option(help="exact: all 101 answers are weighed; verbal: said in words")] = "exact",
    reading: Annotated[str, typer.Option(help="expected or greedy; in words both are what is said")] = "expected",
    shots: Annotated[int, typer.Option(min=0, help="examples before each confidence query")] = 0,
    shots_split: Annotated[str, typer.Option(help="the split that the examples come from")] = "train",
    out: Annotated[Path | None, typer.Option(help="save what was said as npz")] = None,
    adapter: AdapterFolder = None,
    prompts: PromptsFile = "",
    as_json: AsJson = False,
) -> None:
    """Ask a model for its confidence in every candidate answer of a split, and score it; several processes share it."""
    import jax

    from csp_jax.config import ParallelConfig
    from csp_jax.data.shards import ShardSource
    from csp_jax.evaluate import PROTOCOLS, evaluate, open_asking
    from csp_jax.families.registry import open_family
    from csp_jax.models.registry import load_model
    from csp_jax.results import READINGS, result_rows
    from csp_jax.scenes import example_shots, open_scenes
    from csp_jax.sharding import make_mesh
    from csp_jax.train import hosts
    from csp_jax.train.loop import checkpoint_folder, read_prompts

    check_choice("--protocol", "protocol", protocol, PROTOCOLS)
    check_choice("--reading", "reading", reading, READINGS)
    configure_jax()
    hosts.join()
    with hosts.ending_together(lambda: "the others' answers"):
        folder, source = checkpoint_folder(model), ShardSource(shards, split)
        examples = example_shots(ShardSource(shards, shots_split), shots) if shots else ()
        family, mesh = open_family(folder), make_mesh(ParallelConfig(), jax.local_devices())
        asked = read_prompts(prompts)
        scenes = open_scenes(family, asked, source, limit=limit, shots=examples, ask=PROTOCOLS[protocol])
        answers = evaluate(open_asking(load_model(folder, adapter=adapter), family, scenes, mesh), scenes, rows=rows)
    if not hosts.is_first():
        return
    if out:
        answers.save(out)
    found = result_rows([answers], None, model=folder.name, recipe="", reading=reading)
    if not as_json:
        found = [
            row
            for row in found
            if row["metric"] in ("accuracy", "f1", "auc_correctness", "brier", "ece", "direct_accuracy")
        ]
    print_rows(found, as_json, f"{folder} on {split}")


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

    configure_jax()
    answer = ask_picture(checkpoint_folder(model), image, question, read_prompts(prompts), adapter)
    if as_json:
        print_rows([answer], True, "")
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
    """Sample answers to questions about pictures; the same command goes on after an interruption, several processes
    share the questions."""
    from itertools import islice

    from rich.progress import Progress

    from csp_jax.sample import Answerer, Setting, questions, sample_file
    from csp_jax.train import hosts
    from csp_jax.train.loop import checkpoint_folder, read_prompts

    check_choice("--dtype", "precision", dtype, ("float32", "bfloat16"))
    configure_jax()
    hosts.join()
    with (
        hosts.ending_together(lambda: "the others' answers"),
        Progress(console=Console(stderr=True), transient=True, disable=not hosts.is_first()) as bar,
    ):
        asked = list(islice(questions(source, split), limit or None))
        wanted = read_prompts(prompts).answer
        setting = Setting(model, samples, seed, max_tokens, temperature, top_k, top_p, wanted, dtype)
        answerer = Answerer(checkpoint_folder(model), setting, rows)
        task = bar.add_task("batches", total=None)
        now = sample_file(answerer, asked, out, lambda done, total: bar.update(task, completed=done, total=total))
    if hosts.is_first():
        typer.echo(f"{samples} answers to each of {len(asked)} questions ({now} of them answered now): {out}")
