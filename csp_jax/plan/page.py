"""What `csp plan` prints: rows for programs, a page for people."""

from __future__ import annotations

from typing import Any

from csp_jax.config import TrainConfig
from csp_jax.errors import UserError
from csp_jax.plan.roofline import ASSUMPTIONS
from csp_jax.plan.search import Candidate, Trial, describe, recommend
from csp_jax.plan.targets import Target

GIB = 1 << 30


def row(name: str, target: Target, trial: Trial, recommended: bool) -> dict[str, Any]:
    """A trial as an object of `csp plan --json`."""
    found, candidate = trial.found, trial.candidate
    return {
        "config": name,
        "target": str(target),
        "devices": target.devices,
        "mesh": candidate.mesh,
        "batch": {"rows": candidate.rows, "accumulation": candidate.accumulation},
        "remat": candidate.remat,
        "attention": candidate.attention,
        "parameters": found.get("parameters"),
        "bytes_parameters": found.get("bytes_a_device", {}).get("parameters"),
        "bytes_optimizer": found.get("bytes_a_device", {}).get("optimizer"),
        "bytes_arguments": found.get("bytes_arguments"),
        "bytes_temporaries": found.get("bytes_temporaries"),
        "bytes_peak": trial.peak,
        "bytes_available": trial.available,
        "fits": trial.fits,
        "recommended": recommended,
        "flops_useful": found.get("flops_useful"),
        "flops_executed": found.get("flops_executed"),
        "collectives": found.get("collectives", {}),
        "estimated_seconds": found.get("seconds"),
        "estimated_mfu": found.get("mfu"),
        "compile_seconds": found.get("compile_seconds"),
        "error": found.get("error"),
        **({"sampling": found["sampling"]} if "sampling" in found else {}),
    }


def rows(name: str, target: Target, trials: list[Trial]) -> list[dict[str, Any]]:
    """All trials, the recommended one marked."""
    best = recommend(trials)
    return [row(name, target, trial, trial is best) for trial in trials]


def page(name: str, config: TrainConfig, target: Target, trials: list[Trial]) -> str:
    """What fits, what it holds and sends, how fast it can be, and what else was tried."""
    best = recommend(trials)
    shown = best or trials[-1]
    lines = [f"{name} on {target} ({target.devices} devices)", ""]
    lines += _verdict(config, target, trials, best)
    if "error" not in shown.found:
        lines += ["", *_memory(shown, target), "", *_work(shown, target), *_sampling(config, shown)]
    lines += ["", "Tried:"]
    for trial in trials:
        mark = "error" if "error" in trial.found else ("fits" if trial.fits else "too large")
        size = f"{trial.peak / GIB:6.1f} GiB" if trial.peak is not None else " " * 10
        mfu = f"MFU {trial.mfu:.0%}" if trial.mfu else ""
        lines.append(f"  {mark:9} {size}  {mfu:8}  {describe(trial.candidate)}")
    lines += ["", "The estimate assumes:", *(f"  - {text}" for text in ASSUMPTIONS)]
    return "\n".join(lines) + "\n"


def _verdict(config: TrainConfig, target: Target, trials: list[Trial], best: Trial | None) -> list[str]:
    if best is None:
        last = trials[-1]
        if "error" in last.found:
            return [f"Does not compile: {last.found['error']}"]
        return [
            "Does not fit: " + _shortage(last, target),
            "More devices, adapters (model.lora) in place of full fine-tuning, model.param_dtype: bfloat16 or a "
            "shorter data.recipe.shape would make it smaller.",
        ]
    try:
        own = Candidate.of(config, target)
    except UserError as error:
        lines = [f"Recommended: {describe(best.candidate)}", f"As configured it is not for {target}: {error.problem}"]
        first = trials[0]
        if not first.fits:
            lines.append(f"Nearest to it ({describe(first.candidate)}): does not fit: {_shortage(first, target)}")
        return lines
    if best.candidate == own:
        return [f"Fits as configured, and nothing that was tried is better: {describe(own)}"]
    lines = [f"Recommended: {describe(best.candidate)}"]
    tried = next((trial for trial in trials if trial.candidate == own), None)
    if tried:
        missing = "" if tried.fits else _shortage(tried, target)
        why = f"does not fit: {missing}" if missing else f"fits, estimated MFU {tried.mfu:.0%}"
        lines.append(f"As configured ({describe(own)}): {why}")
    return lines


def _shortage(trial: Trial, target: Target) -> str:
    return shortage(row("", target, trial, False))


def shortage(row: dict[str, Any]) -> str:
    """What the trial of a row needs that is not there, and what most of it is."""
    if row["bytes_peak"] is None:
        return row["error"] or "not compiled"
    parts = {name: row[f"bytes_{name}"] or 0 for name in ("parameters", "optimizer")}
    rest = row["bytes_peak"] - sum(parts.values())
    parts["activations"] = rest if row["bytes_temporaries"] is None else row["bytes_temporaries"]
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"a device needs {row['bytes_peak'] / GIB:.1f} GiB of {row['bytes_available'] / GIB:.1f}, most of it {largest} "
        f"({parts[largest] / GIB:.1f} GiB)"
    )


def _memory(trial: Trial, target: Target) -> list[str]:
    found, card = trial.found, target.card
    sizes = found["bytes_a_device"]
    lines = [f"Memory of a device (parameters in all: {found['parameters']:,}):"]
    for label, size in (
        ("parameters", sizes["parameters"]),
        ("optimizer", sizes["optimizer"]),
        ("batch", sizes["batch"]),
        ("activations, gradients, work space", found.get("bytes_temporaries")),
        ("peak", trial.peak),
        (f"available: {card.fraction:.0%} of {card.memory / GIB:.1f} GiB", trial.available),
    ):
        if size is not None:
            lines.append(f"  {label:38} {size / GIB:8.2f} GiB")
    return lines


def _work(trial: Trial, target: Target) -> list[str]:
    found = trial.found
    if "seconds" not in found:
        return []
    sent = [f"  {kind:38} {size / GIB:8.2f} GiB" for kind, size in found["collectives"].items()]
    executed = found["flops_executed"] / found["flops_useful"]
    update = trial.candidate.update
    return [
        "Sent by a device in an update:",
        *(sent or ["  nothing"]),
        "",
        f"Useful work of an update ({update} rows): {found['flops_useful'] / 1e12:,.0f} TFLOP; "
        f"executed: {executed:.2f} x",
        f"Estimate: {found['seconds']:.2f} s an update, MFU {found['mfu']:.1%}, "
        f"{update / found['seconds']:.1f} rows a second",
        f"  alone, products would take {found['seconds_products']:.2f} s, memory traffic "
        f"{found['seconds_traffic']:.2f} s, collectives {found['seconds_wires']:.2f} s",
        f"Compiled in {found['compile_seconds']:.0f} s for {target.card.name}",
    ]


def _sampling(config: TrainConfig, trial: Trial) -> list[str]:
    """Of GRPO: what comes before an update."""
    found, how = trial.found.get("sampling"), config.rollout
    if not found:
        return []
    asked = f"{trial.candidate.update} questions, {how.samples} samples of {how.max_tokens} tokens"
    seconds = f"at most {found['seconds']:.1f} s, " if found["seconds"] else ""
    return [f"Sampling a round ({asked}): {seconds}peak {found['bytes_peak'] / GIB:.2f} GiB"]


def markdown(found: list[dict[str, Any]]) -> str:
    """The recommended row of every configuration and target as a table."""
    head = (
        "| configuration | target | mesh | rows x accumulation | remat | attention | "
        "peak of available, GiB | sent, GiB | TFLOP an update | estimated MFU |"
    )
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in found:
        if not row["recommended"]:
            continue
        memory = f"{row['bytes_peak'] / GIB:.1f} of {row['bytes_available'] / GIB:.1f}"
        sent = f"{sum(row['collectives'].values()) / GIB:.1f}"
        work, mfu = f"{row['flops_useful'] / 1e12:,.0f}", f"{row['estimated_mfu']:.0%}"
        lines.append(f"| {' | '.join((*_described(row), memory, sent, work, mfu))} |")
    return "\n".join(lines) + "\n"


def markdown_of_misfits(found: list[dict[str, Any]]) -> str:
    """What was tried and does not fit or compile, and why, as a table."""
    head = "| configuration | target | mesh | rows x accumulation | remat | attention | why not |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in found:
        if row["fits"]:
            continue
        lines.append(f"| {' | '.join((*_described(row), shortage(row)))} |")
    return "\n".join(lines) + "\n"


def _described(row: dict[str, Any]) -> tuple[str, ...]:
    """The first cells of a row of a table: what was planned, and how."""
    mesh = " x ".join(str(size) for size in row["mesh"].values())
    batch = f"{row['batch']['rows']} x {row['batch']['accumulation']}"
    return row["config"], row["target"], mesh, batch, row["remat"], row["attention"]
