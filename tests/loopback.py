"""Commands and trainings in several processes on this machine, a device each, that find each other over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

CSP = "from csp_jax.cli import main; main()"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def host_environments(count: int) -> list[dict[str, str]]:
    """What each of so many processes has set; a single one is not joined with any other."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    alone = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    if count == 1:
        return [alone]
    pod = {**alone, "CSP_COORDINATOR": f"127.0.0.1:{free_port()}", "CSP_PROCESSES": str(count)}
    return [{**pod, "CSP_PROCESS": str(number)} for number in range(count)]


def csp_on_hosts(count: int, *arguments: object) -> list[str]:
    """Run `csp` with these arguments in so many processes at once; what each prints. All must succeed."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CSP, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in host_environments(count)
    ]
    try:
        said = [process.communicate(timeout=1800) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, [errors[-2000:] for _, errors in said]
    return [printed for printed, _ in said]


class Pod:
    """Processes of one run, started as `python SCRIPT CONFIG.yaml`; compiled programs are kept beside the run."""

    def __init__(self, script: Path, config: Path, out: Path, count: int):
        self.out, self.count = out, count
        self.logs = [out.with_suffix(f".{number}.log") for number in range(count)]
        self.processes = []
        for log, environment in zip(self.logs, host_environments(count), strict=True):
            environment["JAX_COMPILATION_CACHE_DIR"] = str(out.parent / "compiled")
            with log.open("a") as stream:
                command = [sys.executable, str(script), str(config)]
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )

    def wait(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]

    def finish(self) -> Path:
        assert self.wait() == [0] * self.count, self.said()
        return self.out

    def said(self) -> str:
        return "\n".join(log.read_text()[-2000:] for log in self.logs)

    def wait_for_step(self, step: int) -> None:
        metrics = self.out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)
