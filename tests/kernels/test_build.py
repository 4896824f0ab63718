"""The setuptools commands that build the kernel, the wheel and the sdist. They need no network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools", minversion="77", reason="it builds packages")

from simam.kernels import cpu
from simam.kernels.build import BuildKernel

LIBRARY = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"
CHECKOUT = Path(__file__).parents[2]
STUB = "int stub(void) { return 0; }\n"  # compiles faster than the kernel


def build_kernel(folder: Path) -> list[str]:
    """Compile kernel.c in a folder, and return the names of the files in its folder `built`."""
    extension = setuptools.Extension("_cpu", [str(folder / "kernel.c")])
    command = BuildKernel(setuptools.Distribution({"ext_modules": [extension]}))
    command.build_lib = command.build_temp = str(folder / "built")
    command.ensure_finalized()
    command.run()
    return sorted(path.name for path in (folder / "built").glob("_cpu.*"))


def test_build_kernel_writes_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel.c").write_text(STUB)
    monkeypatch.setenv("SIMAM_REQUIRE_KERNEL", "1")
    assert build_kernel(tmp_path) == [LIBRARY]


@pytest.mark.parametrize("failure", ["no compiler", "invalid source"])
def test_build_kernel_writes_reason_of_failure(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.c").write_text("this is no C\n")
    if failure == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv("SIMAM_REQUIRE_KERNEL", raising=False)
    assert build_kernel(tmp_path) == ["_cpu.txt"]
    reason = (tmp_path / "built" / "_cpu.txt").read_text()
    assert reason.startswith("the compiler failed: ")
    assert failure != "no compiler" or "no-such-compiler" in reason
    monkeypatch.setenv("SIMAM_REQUIRE_KERNEL", "1")
    with pytest.raises(Exception, match=r"no-such-compiler|failed|exit"):
        build_kernel(tmp_path)


def test_load_rejects_library_that_lacks_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.c").write_text(STUB)
    build_kernel(tmp_path)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "built" / "cpu.py"))
    library, reason = cpu._load()
    assert library is None
    assert reason.startswith("it cannot be loaded (")
    assert "simam_forward" in reason
    assert reason.endswith("); reinstall simam")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what the package is built from, with a stub in place of the kernel."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("_cpu.*", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT / "src", copy / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy)
    (copy / "src/simam/kernels/csrc/simam_cpu.c").write_text(STUB)
    return copy


def run_hooks(checkout: Path, target: str) -> Path:
    """Call the hooks of the build backend as pip does, and return the file that they build.

    Args:
        checkout (Path): root of the sources.
        target (str): "wheel", "editable" or "sdist".
    """
    output = checkout.parent / target
    output.mkdir()
    hooks = [f"get_requires_for_build_{target}()", f"build_{target}({str(output)!r})"]
    if target != "sdist":
        hooks.insert(1, f"prepare_metadata_for_build_{target}({str(output)!r})")
    environment = os.environ | {"SIMAM_REQUIRE_KERNEL": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for hook in hooks:
        program = f"from setuptools import build_meta; build_meta.{hook}"
        subprocess.run([sys.executable, "-c", program], cwd=checkout, env=environment, check=True)
    (built,) = (path for path in output.iterdir() if path.is_file())
    return built


def files(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to the folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sources(checkout: Path) -> set[str]:
    """Return the files of the package, without its notes for developers."""
    return {name for name in files(checkout / "src") if not name.endswith(".md")}


def test_build_wheel_leaves_no_files_and_uses_none(checkout: Path) -> None:
    # What an earlier build, or an earlier version of the build, left in the checkout.
    stale = checkout / "build/lib/simam/stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    before = files(checkout)
    wheel = run_hooks(checkout, "wheel")
    assert files(checkout) == before
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packaged = {name for name in names if name.startswith("simam/")}
    assert packaged == sources(checkout) | {f"simam/kernels/{LIBRARY}"}


def test_build_editable_leaves_only_the_kernel(checkout: Path) -> None:
    before = files(checkout)
    run_hooks(checkout, "editable")
    assert files(checkout) - before == {f"src/simam/kernels/{LIBRARY}"}


def test_build_sdist_contains_all_sources(checkout: Path) -> None:
    expected = {f"src/{name}" for name in sources(checkout)}
    with tarfile.open(run_hooks(checkout, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"pyproject.toml", "README.md", "LICENSE"} <= names
