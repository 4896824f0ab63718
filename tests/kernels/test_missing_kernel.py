"""Without the compiled kernel all works, and says so once; how it comes to be missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import simam

PROGRAM = """
import torch
import simam
x = torch.randn(2, 3, 4, 5, requires_grad=True)
for _ in range(2):
    y = simam.SimAM()(x)
    y.backward(torch.ones_like(y))
print(torch.equal(y, simam.reference.forward(x, 1e-4, "shared")))
print(torch.equal(torch.ops.simam.forward(x.detach(), 1e-4, "shared"), y))
print([entry.fused for entry in simam.kernels_info() if entry.device == "cpu"])
print(simam.kernels_info())
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the kernels' folder, in a copy of the package, without the compiled library."""
    source = Path(simam.__file__).parent
    ignore = shutil.ignore_patterns("_cpu.*", "__pycache__")
    return shutil.copytree(source, tmp_path / "simam", ignore=ignore) / "kernels"


def run(package: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import simam.reference\n" + PROGRAM]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=package.parent.parent
    )


def test_there_is_none(package: Path) -> None:
    done = run(package)
    equal, same, fused, *table = done.stdout.splitlines()
    assert equal == same == "True"
    assert fused == "[False, False, False, False]"
    reason = f"it was not built (there is no {package / '_cpu'}"
    assert reason in table[1]
    assert done.stderr.count("RuntimeWarning") == 1
    told = f"simam runs without its fused CPU kernel, several times slower: {reason}"
    assert told in done.stderr
    assert "install a C compiler, then simam anew" in done.stderr


def test_the_build_left_a_reason(package: Path) -> None:
    (package / "_cpu.txt").write_text("no compiler was found")
    assert "it was not built (no compiler was found);" in run(package).stderr


def test_it_cannot_be_loaded(package: Path) -> None:
    (package / ("_cpu.dll" if sys.platform == "win32" else "_cpu.so")).write_text("not a library")
    done = run(package)
    assert done.stdout.startswith("True\nTrue\n[False")
    assert "it cannot be loaded (" in done.stderr
    assert "install simam anew" in done.stderr


def build(folder: Path) -> list[str]:
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="it builds packages")
    from simam.kernels.build import BuildKernel

    extension = setuptools.Extension("_cpu", [str(folder / "cpu.c")])
    command = BuildKernel(setuptools.Distribution({"ext_modules": [extension]}))
    command.build_lib = command.build_temp = str(folder / "built")
    command.ensure_finalized()
    command.run()
    return sorted(path.name for path in (folder / "built").glob("_cpu.*"))


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.c").write_text("int simam_cpu(void) { return 0; }\n")
    monkeypatch.setenv("SIMAM_REQUIRE_KERNEL", "1")
    (library,) = build(tmp_path)
    assert library in ("_cpu.so", "_cpu.dll")


@pytest.mark.parametrize("failure", ["no compiler", "no kernel"])
def test_build_that_fails(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.c").write_text("this is no C\n")
    if failure == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv("SIMAM_REQUIRE_KERNEL", raising=False)
    assert build(tmp_path) == ["_cpu.txt"]
    reason = (tmp_path / "built" / "_cpu.txt").read_text()
    assert reason.startswith("the compiler failed: ")
    assert failure != "no compiler" or "no-such-compiler" in reason
    monkeypatch.setenv("SIMAM_REQUIRE_KERNEL", "1")
    with pytest.raises(Exception, match=r"no-such-compiler|failed|exit"):
        build(tmp_path)
