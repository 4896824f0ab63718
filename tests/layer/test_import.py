"""`import simam` imports no optional package."""

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("timm", "torchvision", "matplotlib", "triton")


def imported_by(statement: str, after: str = "import sys") -> set[str]:
    """Return the optional packages that a statement imports after another one."""
    program = (
        f"{after}; import sys; before = set(sys.modules); {statement}; "
        f"print(*((sys.modules.keys() - before) & set({OPTIONAL!r})))"
    )
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_loads_no_optional_package() -> None:
    # After torch, some versions of which import some of these packages where they are installed.
    assert imported_by("import simam", after="import torch") == set()


@pytest.mark.parametrize("package", OPTIONAL)
def test_import_check_sees_an_optional_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An empty module, so that the test does not depend on what is installed.
    (tmp_path / f"{package}.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert imported_by(f"import {package}") == {package}
