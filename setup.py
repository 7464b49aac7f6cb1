"""Everything about the package stands in pyproject.toml; this puts configs/ into the wheel, as csp_jax/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The configurations lie at the top of the tree, where people look for them, and `csp` needs them installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "csp_jax" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
