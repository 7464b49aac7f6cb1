"""This project: the real step, rollout and evaluation pass (`csp_jax.bench`) on the prepared folder."""

from __future__ import annotations

from pathlib import Path

from turns import Turns, arguments


def main() -> None:
    given = arguments()
    turns = Turns()
    from csp_jax.bench.run import Settings, made_config, make_tasks
    from csp_jax.cli.app import configure_jax

    configure_jax()
    folder = Path(given.folder)
    lora = [f"model.lora.rank={given.rank}", f"model.lora.alpha={2 * given.rank}"] if given.rank else []
    settings = Settings(given.rows, given.accumulation, given.samples, given.tokens)
    name = {"eval": "sft", "verbal": "sft", "query": "sft"}.get(given.task, given.task)
    config = made_config(name, folder / "model", folder / "records", settings, lora)
    task = query(config) if given.task == "query" else make_tasks(config, [given.task])[0]
    while True:
        turns.wait()
        task()
        turns.done()


def query(config):
    """One confidence query a picture: picture and words read, all 101 answers scored; a picture a row."""
    import jax

    from csp_jax.bench.tasks import packed, prefill_and_distribution
    from csp_jax.evaluate import Scorer
    from csp_jax.families.registry import open_family
    from csp_jax.train.loop import Run

    run = Run(config)
    family, scorer = open_family(run.source_folder), Scorer(run.model(), run.mesh)

    def turn() -> None:
        _, samples = prefill_and_distribution(family, run.source, run.rows)
        jax.block_until_ready([scorer(batch) for batch in packed(samples, run.rows)])

    return turn


if __name__ == "__main__":
    main()
