"""Setuptools commands that build the CPU kernel. They run without torch and without simam."""

import atexit
import os
import shutil
import tempfile
import textwrap
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import BaseError, CCompilerError

# Not -ffast-math, which would set flush-to-zero for the whole process.
_GNU = "-O3 -g0 -std=gnu11 -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd"
_MSVC = "/O2 /std:c11 /openmp:experimental"


class BuildKernel(build_ext):
    """Build the kernel as a plain shared library; if that fails, write down why.

    The reason goes to a text file in the library's place, and the package installs without the
    kernel. If the environment variable SIMAM_REQUIRE_KERNEL is set, as for releases and CI, a
    kernel that cannot be built is an error instead.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # Without the tag of a Python version, because the library does not use Python.
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # The source declares the exports. There is no PyInit function.

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
            self.warn(f"the CPU kernel was not built, so simam will be slower: {error}")


class TemporaryBuild(build):
    """Build in a temporary directory, so that no later build packages what this one leaves."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = _temporary_directory()


class TemporaryEggInfo(egg_info):
    """Write the metadata to a temporary directory, except for an sdist, which contains them."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if "sdist" not in self.distribution.commands:
            self.egg_base = _temporary_directory()


class TagWheel(bdist_wheel):
    """Tag the wheel for every Python 3, because only the platform matters."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _temporary_directory() -> str:
    """Create a directory that is deleted when the process ends."""
    directory = tempfile.mkdtemp(prefix="simam-build-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
