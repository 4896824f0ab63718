"""The command `simam` run in the tests' process, and what it printed."""

import json
from typing import Any

import pytest

from simam.cli import main

SMALL = "timm/test_resnet"  # 4 blocks
INSTALL = 'pip install "simam[timm]"'

Capture = pytest.CaptureFixture[str]


def report(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main(["report", *arguments, "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def message(capsys: Capture, *arguments: str) -> str:
    """What the command says of a mistake, after checking that it says nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("simam: error: ")
    assert "Traceback" not in err
    return err.removeprefix("simam: error: ").removesuffix("\n")


def mistake(capsys: Capture, *arguments: str) -> str:
    return message(capsys, "report", *arguments)
