"""Commands in several processes on this machine, a device each, that find each other over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

CSP = "from csp_jax.cli import main; main()"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def csp_on_hosts(count: int, *arguments: object) -> list[str]:
    """Run `csp` with these arguments in so many processes at once; what each prints. All must succeed."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    pod = {"CSP_COORDINATOR": f"127.0.0.1:{free_port()}", "CSP_PROCESSES": str(count)}
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **pod}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CSP, *map(str, arguments)],
            env={**environment, "CSP_PROCESS": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        said = [process.communicate(timeout=1800) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, [errors[-2000:] for _, errors in said]
    return [printed for printed, _ in said]
