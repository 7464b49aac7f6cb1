"""The compilers of the `plan` extra, and the child process that uses them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path
from types import TracebackType
from typing import Any

from csp_jax.config import TrainConfig
from csp_jax.errors import UserError
from csp_jax.plan.targets import Target

# Per platform: what the compiler needs, as distributions, and a module or file by which each is recognized.
PACKAGES = {
    "cuda": {
        "jax-cuda12-plugin": "jax_cuda12_plugin",
        "jax-cuda12-pjrt": "jax_plugins/xla_cuda12",
        "nvidia-cuda-nvcc-cu12": "nvidia/cuda_nvcc",
    },
    "tpu": {"libtpu": "libtpu"},
}


def require_compiler(target: Target, packages: Path | None) -> None:
    """UserError names the extra and the command where the target's compiler is not installed."""
    places = [str(packages)] if packages else sys.path
    wanted = PACKAGES[target.card.platform]
    missing = [name for name, module in wanted.items() if not _is_there(module, places)]
    if not missing:
        return
    version = importlib.metadata.version("jax")
    pins = {"jax-cuda12-plugin": f"=={version}", "jax-cuda12-pjrt": f"=={version}"}
    apart = " ".join(f"{name}{pins.get(name, '')}" for name in wanted)
    raise UserError(
        f"no compiler for {target.card.name}: {', '.join(missing)} not installed",
        field="--target",
        value=str(target),
        mend="The extra `plan` has them: pip install 'csp_jax[plan]'. Or keep them apart, so that nothing else sees "
        f"them: pip install --no-deps --target DIR {apart}, then csp plan --packages DIR",
    )


def _is_there(module: str, places: list[str]) -> bool:
    if "/" in module:
        return any((Path(place) / module).is_dir() for place in places)
    return PathFinder.find_spec(module, places) is not None


class Compiler:
    """A child process that compiles candidates for one target; started anew if it dies."""

    def __init__(self, target: Target, packages: Path | None = None):
        require_compiler(target, packages)
        self.target, self.packages = target, packages
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform" not in flag]
            path = [str(self.packages)] if self.packages else []
            path += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "csp_jax.plan.compile", str(self.target)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": os.pathsep.join(path)},
            )
        return self._process

    def measure(self, config: TrainConfig, folder: Path) -> dict[str, Any]:
        """What the child says of a candidate; `error` where it could not be compiled."""
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"config": config.model_dump(mode="json"), "folder": str(folder)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self._log.seek(0)
        lines = [text for text in self._log.read().splitlines() if text.strip()]
        return {"error": f"the compiler died with status {process.wait()}: {lines[-1][:300] if lines else 'silently'}"}
