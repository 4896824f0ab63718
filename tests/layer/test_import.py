"""`import simam` brings torch and nothing that is optional."""

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("timm", "torchvision", "matplotlib", "triton")


def brought_by(statement: str) -> set[str]:
    """The optional packages that a fresh interpreter holds after a statement."""
    program = f"import sys; {statement}; print(*(sys.modules.keys() & set({OPTIONAL!r})))"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_brings_nothing_optional() -> None:
    # torch itself imports some of them in some versions, where they are installed.
    assert brought_by("import simam") <= brought_by("import torch")


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_import_is_seen(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in, so that the check does not hang on what is installed.
    (tmp_path / f"{package}.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert brought_by(f"import {package}") == {package}
