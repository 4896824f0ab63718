"""Without the compiled kernel everything works, and one warning says why the kernel is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import simam

PROGRAM = """
import torch
import simam.reference
x = torch.randn(2, 3, 4, 5, requires_grad=True)
for _ in range(2):
    y = simam.SimAM()(x)
    y.backward(torch.ones_like(y))
print(torch.equal(y, simam.reference.forward(x, 1e-4, "shared")))
print(torch.equal(torch.ops.simam.forward(x.detach(), 1e-4, "shared"), y))
print([entry.fused for entry in simam.kernels_info() if entry.device == "cpu"])
print(simam.kernels_info())
"""
LIBRARY = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """Return simam/kernels in a copy of the package that has no compiled library."""
    source = Path(simam.__file__).parent
    ignore = shutil.ignore_patterns("_cpu.*", "__pycache__")
    return shutil.copytree(source, tmp_path / "simam", ignore=ignore) / "kernels"


def run_without_kernel(kernels: Path) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM with the copied package, and check that no CPU kernel runs."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        cwd=kernels.parent.parent,
    )
    assert done.stdout.startswith("True\nTrue\n[False, False, False, False]\n")
    return done


def test_simam_runs_and_warns_once_without_library(kernels: Path) -> None:
    done = run_without_kernel(kernels)
    table = done.stdout.splitlines()[3:]
    reason = f"it was not built ({kernels / LIBRARY} does not exist)"
    assert reason in table[1]
    assert done.stderr.count("RuntimeWarning") == 1
    message = f"simam runs without its fused CPU kernel, several times slower: {reason}"
    assert message in done.stderr
    assert "; install a C compiler and reinstall simam" in done.stderr


def test_simam_warns_with_reason_of_failed_build(kernels: Path) -> None:
    (kernels / "_cpu.txt").write_text("no compiler was found")
    assert "it was not built (no compiler was found);" in run_without_kernel(kernels).stderr


def test_simam_warns_if_library_cannot_be_loaded(kernels: Path) -> None:
    (kernels / LIBRARY).write_text("not a library")
    done = run_without_kernel(kernels)
    assert "it cannot be loaded (" in done.stderr
    assert "); reinstall simam" in done.stderr
