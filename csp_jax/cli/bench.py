"""`csp bench`: how fast the real programs are on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from csp_jax.cli.app import AsJson, app, check_choice, configure_jax, print_rows


@app.command()
def bench(
    configs: Annotated[list[Path] | None, typer.Argument(help="trainings' YAMLs; none: made trainings")] = None,
    model: Annotated[str, typer.Option(help="llava-112, -224, -336, decoder, or a checkpoint's folder")] = "llava-112",
    task: Annotated[
        list[str] | None,
        typer.Option(help="sft, simpo, grpo, base, eval, verbal or prefill; again for more [default: all]"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="turns that count")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="rows of a micro-batch")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="micro-batches of an update")] = 2,
    prompt: Annotated[int, typer.Option(min=0, help="tokens of a prompt, picture included; 0: a short one")] = 115,
    samples: Annotated[int, typer.Option(min=2, help="a policy's samples of a prompt")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each")] = 8,
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value, such as model.remat=full")] = None,
    keep: Annotated[Path | None, typer.Option(help="a folder for what is made; it serves again")] = None,
    growth: Annotated[bool, typer.Option("--growth", help="how cost grows with responses and vocabulary")] = False,
    as_json: AsJson = False,
) -> None:
    """Time the real step, sampler and evaluation pass in turns, beside the machine's rate of matrix products."""
    from csp_jax.bench import run
    from csp_jax.bench.made import Lengths

    for name in task or ():
        check_choice("--task", "task", name, run.TASKS)
    configure_jax()
    sizes = run.Settings(rows, accumulation, samples, tokens, Lengths(prompt))
    say = Console(stderr=True, highlight=False).print
    with tempfile.TemporaryDirectory(prefix="csp-bench-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if growth:
            from csp_jax.bench.growth import growth_rows

            print_rows(growth_rows(model, sizes, folder, settings or [], repeats, say), as_json, f"growth of {model}")
            return
        if configs:
            read = [(file, run.given_config(file, folder, sizes, settings or [])) for file in configs]
            tasks = [
                made
                for file, config in read
                for made in run.make_tasks(config, task or [config.loss.name], f"{file.stem} " if len(read) > 1 else "")
            ]
        else:
            tasks = run.made_tasks(model, task or run.TASKS, sizes, folder, settings or [])
        dtype = tasks[0].run.config.model.dtype if isinstance(tasks[0], run.Updates) else "float32"
        found = run.measure(tasks, repeats=repeats, dtype=dtype, say=say)
    title = ", ".join(str(file) for file in configs or []) or f"{model}, {rows} x {accumulation} rows"
    print_rows(found if as_json else [shown(row) for row in found], as_json, title)
    if not as_json:
        say(machine(found[0]))


def machine(row: dict[str, Any]) -> str:
    """What all rows say of where they were measured."""
    busy = row["cores_busy_elsewhere"]
    elsewhere = "" if busy is None else f"; others kept {busy:.1f} of {row['cores']} cores busy"
    return f"{row['devices']} x {row['device']}, peak of the {row['peak_of']} {gib(row['peak_bytes'])}{elsewhere}"


def gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row as the table has it; `unshared` is how many times the tokens separate sequences would have."""

    def number(name: str, form: str = ".1f") -> str:
        return format(row[name], form) if row[name] else ""

    return {
        "task": row["task"],
        "s": f"{row['seconds']:.3f}",
        "best s": f"{row['best_seconds']:.3f}",
        "ratio": f"{row['ratio']:.2f} {row['ratio_to']}",
        "images/s": number("images_per_second"),
        "samples/s": number("samples_per_second"),
        "tokens/s": number("tokens_per_second", ".0f"),
        "unshared": f"x{row['sequence_tokens'] / row['tokens']:.2f}" if row["tokens"] else "",
        "GFLOP/s": f"{row['flops_per_second'] / 1e9:.1f}" if row["flops"] else "",
        "MFU": number("mfu", ".0%"),
        "memory": gib(row["program_bytes"]),
    }
