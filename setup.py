"""Everything is in pyproject.toml but the CUDA extension, which attnfuse/build.py compiles.

ATTNFUSE_CUDA=auto (the default) builds it where there is an nvcc and installs pure Python where there is none; with 1
it must be built, with 0 it is not. A compilation that fails is an error.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """attnfuse/build.py by its path: attnfuse itself would want torch."""
    spec = importlib.util.spec_from_file_location("attnfuse_build", ROOT / "attnfuse" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildCuda(build_ext):
    """One extension; its objects stay in build/cuda, so that the next build compiles what has changed."""

    def build_extension(self, ext: Extension) -> None:
        build = load_build()
        try:
            build.build_cuda(ROOT / "build" / "cuda", Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            sys.exit(f"attnfuse: {error}; ATTNFUSE_CUDA=0 installs it without its CUDA kernels")


def extensions() -> list[Extension]:
    """The CUDA extension, if ATTNFUSE_CUDA and this machine say so."""
    asked = os.environ.get("ATTNFUSE_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        sys.exit(f"ATTNFUSE_CUDA must be auto, 0 or 1, got {asked!r}")
    wanted = asked == "1" or (asked == "auto" and load_build().cuda_home() is not None)
    return [Extension("attnfuse._cuda", [])] if wanted else []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
