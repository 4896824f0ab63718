"""Builds the CPU kernel with the package. Runs where neither torch nor simam is installed."""

import os
import textwrap
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Not -ffast-math, which would set flush-to-zero for the whole process.
_GNU = "-O3 -g0 -std=gnu11 -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd"
_MSVC = "/O2 /std:c11 /openmp:experimental"


class BuildKernel(build_ext):
    """Build a plain shared library; without one, leave the reason in its place.

    With the environment variable SIMAM_REQUIRE_KERNEL, for releases and CI, a kernel that cannot
    be built is an error.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # No Python in the name, since there is none in the library.
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # the source says what is exported; there is no PyInit

    def build_extension(self, ext: Extension) -> None:
        required = bool(os.environ.get("SIMAM_REQUIRE_KERNEL"))
        ext.optional = not required
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = (_MSVC if msvc else _GNU).split()
        library = Path(self.get_ext_fullpath(ext.name))
        reason = library.with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if required:
                raise
            library.unlink(missing_ok=True)
            reason.parent.mkdir(parents=True, exist_ok=True)
            summary = textwrap.shorten(str(error), 100, placeholder=" ...")
            reason.write_text(f"the compiler failed: {summary}; see pip install -v")
            self.warn(f"the CPU kernel was not built, and simam will be slower: {error}")


class TagWheel(bdist_wheel):
    """Tag the wheel for every Python 3, since only the platform matters."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
