"""Run the command `simam` in the process of the tests, and check what it prints."""

import json
from typing import Any

import pytest

from simam.cli import main

SMALL = "timm/test_resnet"  # 4 blocks

Capture = pytest.CaptureFixture[str]


def report(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """The JSON of `simam report`, with one timed pair of forward passes."""
    assert main(["report", *arguments, "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def error_message(capsys: Capture, *arguments: str) -> str:
    """The error message of the command, which must print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("simam: error: ")
    assert "Traceback" not in err
    return err.removeprefix("simam: error: ").removesuffix("\n")


def report_error(capsys: Capture, *arguments: str) -> str:
    """The error message of `simam report`."""
    return error_message(capsys, "report", *arguments)
