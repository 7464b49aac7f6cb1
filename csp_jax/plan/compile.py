"""The child process of `csp plan`: compiles candidates for a target, one line of JSON in and one out for each.

It runs apart because a process has one set of compilers, because they print, and because a compiler that runs out of
memory takes its process with it. Nothing here needs the devices.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from csp_jax.plan.targets import Target, parse_target

GPU_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Kernels of its own are chosen by timing them, which needs a device; cuBLAS needs none.
    "xla_gpu_enable_triton_gemm": False,
    # Schedule and memory are settled before code is generated; this code is never run.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
TPU_TYPES = {"v5e": "v5litepod-{}", "v5p": "v5p-{}", "v6e": "v6e-{}"}


def environment(target: Target) -> dict[str, str]:
    """What a process that compiles for `target` must have set before it loads JAX.

    libtpu asks the machine what it is: here it is told. It also keeps the machine to one process, for the sake of chips
    that are not used here: several plans may be made at once, beside a training too.
    """
    if target.card.platform != "tpu":
        return {"JAX_PLATFORMS": "cpu"}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_ACCELERATOR_TYPE": TPU_TYPES[target.card.name].format(target.devices),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(target: Target) -> list[Any]:
    """The target's devices as the compiler describes them."""
    from jax.experimental import topologies

    if target.card.platform == "tpu":
        name = f"{target.card.name}:{target.topology}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    text = target.card.compiler_description()
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="gpu", topology=target.topology, target_config=text
    )
    return list(found.devices)


def measure(request: dict[str, Any], target: Target, found: list[Any]) -> dict[str, Any]:
    """Compile one candidate, of GRPO its sampler too; everything that is read from what came out."""
    from csp_jax.config import TrainConfig
    from csp_jax.plan.program import step_program
    from csp_jax.sharding import make_mesh

    config = TrainConfig.model_validate(request["config"])
    mesh = make_mesh(config.parallel, found)
    program = step_program(config, Path(request["folder"]), mesh)
    flops = program.useful_flops()
    answer: dict[str, Any] = {
        "parameters": program.parameters(),
        "bytes_a_device": program.bytes_a_device(),
        "flops_useful": flops,
    }
    step = compiled_cost(program.lower(), target)
    answer |= step
    if "seconds" in step:
        answer |= {
            "flops_executed": step["flops_executed"] * target.devices,
            "mfu": flops / (step["seconds"] * target.devices * target.card.flops),
        }
    if config.loss.name == "grpo":
        sampler = compiled_cost(program.lower_sampler(), target, config.rollout.max_tokens - 1)
        answer["bytes_peak"] = max(step["bytes_peak"], sampler["bytes_peak"])
        times = -(-config.batch.rows * config.batch.accumulation // program.sampled_rows())
        seconds = sampler["seconds"] * times if "seconds" in sampler else None
        answer["sampling"] = {"bytes_peak": sampler["bytes_peak"], "seconds": seconds}
    return answer


def compiled_cost(lowered: Any, target: Target, unknown_trips: int = 1) -> dict[str, Any]:
    """What a program needs of a device and how long it takes there; of one that has no room, what it needs alone.

    `unknown_trips`: how often loops run that nobody knows of (`hlo.Program`).
    """
    from csp_jax.plan.hlo import parse
    from csp_jax.plan.roofline import Schedule

    start = time.perf_counter()
    try:
        compiled = lowered.compile(GPU_OPTIONS if target.card.platform == "cuda" else None)
    except Exception as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return {"bytes_peak": needed, "compile_seconds": time.perf_counter() - start}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    cost = Schedule(parse(text, unknown_trips), target).step()
    return {
        "compile_seconds": time.perf_counter() - start,
        "bytes_arguments": memory.argument_size_in_bytes,
        "bytes_temporaries": memory.temp_size_in_bytes,
        "bytes_peak": memory.peak_memory_in_bytes,
        "collectives": {kind: int(size) for kind, size in sorted(cost.collectives.items()) if size},
        "seconds": cost.seconds,
        "seconds_products": cost.products,
        "seconds_traffic": cost.traffic,
        "seconds_wires": cost.wires,
        "flops_executed": cost.flops,
    }


def needed_bytes(message: str) -> int | None:
    """What a TPU compiler says is needed (of temporaries alone, if they are too large already) when it is more than
    there is; None: the error is another one."""
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|temporaries \(([\d.]+)([KMG])\) exceeds", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * 1024 ** ("KMG".index(unit) + 1))


def main() -> None:
    """Answers on the file descriptor that standard output was; what compilers print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target = parse_target(sys.argv[1])
    os.environ.update(environment(target))
    found = devices(target)
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line), target, found)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
