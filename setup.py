"""Builds the native libraries beside the package; pyproject.toml has the rest.

EFFT_KERNELS_BUILD_CUDA=auto|0|1    whether to build the CUDA library; auto: if nvcc is there
EFFT_KERNELS_CUDA_ARCHS="8.0;9.0a"  for which GPUs
MAX_JOBS                            how many compilers run at once; default: all cores

A machine without a compiler gets the Python package alone; `efft-kernels doctor` names what is
missing. Links of README are made absolute, for an index's page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.compat.py310 import tomllib
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "build"))

import native_build  # noqa: E402
from long_description import long_description  # noqa: E402
from toolchain import Missing, Settings, ToolError  # noqa: E402

PACKAGE = "efft_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository")


class BuildNative(build_ext):
    """Builds all libraries by csrc/build/native_build.py, and puts them where pip wants them.

    An editable install keeps its objects in build/native, so that the next one compiles only what
    changed; the folder that setuptools offers is a temporary one.
    """

    def build_extensions(self) -> None:
        build_dir = ROOT / "build" / "native" if self.inplace_asked else Path(self.build_temp)
        try:
            graph = native_build.build(Settings.from_environment(os.environ), build_dir)
        except ToolError as error:
            raise ExecError(str(error)) from error
        package = ROOT / PACKAGE if self.inplace_asked else Path(self.build_lib, PACKAGE)
        native_build.install(graph, build_dir, package)

    def run(self) -> None:
        # setuptools clears `inplace` while it builds, to copy the results afterwards.
        self.inplace_asked = bool(self.inplace)
        super().run()

    def copy_extensions_to_source(self) -> None:
        """Nothing: `build_extensions` has put them there."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, native_build.filename(name))


def extension(name: str) -> Extension:
    """Only its name and, for the sdist, its sources: the build is native_build's."""
    try:
        sources = [str(path.relative_to(ROOT)) for path in native_build.sources(name)]
    except Missing:
        sources = []
    return Extension(f"{PACKAGE}.{name}", sources, optional=True)


setup(
    long_description=long_description((ROOT / "README.md").read_text("utf-8"), REPOSITORY),
    long_description_content_type="text/markdown",
    ext_modules=[extension(name) for name in native_build.LIBRARIES],
    cmdclass={"build_ext": BuildNative},
)
