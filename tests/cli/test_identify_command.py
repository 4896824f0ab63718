"""`simam identify`: its text and its error messages."""

import re
import sys
from pathlib import Path

import pytest

from simam.cli import main
from tests.helpers.command import Capture, error_message

SOURCE = """
import torch
from torch import nn
from neighbour import HALF

print("importing")

class SimAM(nn.Module):
    def __init__(self, channels=None, e_lambda=1e-4, *, scale=1):
        super().__init__()
        self.e_lambda, self.scale = e_lambda, scale

    def forward(self, x):
        square = (x - x.mean((2, 3), keepdim=True)) ** 2
        variance = square.sum((2, 3), keepdim=True) / (x[0, 0].numel() - 1)
        return self.scale * x * torch.sigmoid(square / (4 * (variance + self.e_lambda)) + HALF)

class Needy(SimAM):
    def __init__(self, channels, e_lambda):
        super().__init__(channels, e_lambda)

class Strict(SimAM):
    def __init__(self, channels):
        raise RuntimeError("channels must be odd")

class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x * y

class Plain:
    pass

def helper():
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("HALF = 0.5\n")
    path = tmp_path / "attention.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    ("call", "formula", "e_lambda", "words"),
    [
        ("SimAM", "shared", "0.0001", "overflows in float16"),
        ("SimAM(64, e_lambda=0.1)", "shared", "0.1", "NaN on a map of one element"),
        ("Needy(64, 0.01)", "shared", "0.01", "overflows in float16"),
        ("SimAM(scale=2)", "other", "0.0001", "multiplies the product by 2"),
    ],
)
def test_identify_prints_a_table(
    call: str, formula: str, e_lambda: str, words: str, file: str, capsys: Capture
) -> None:
    path = list(sys.path)
    assert main(["identify", f"{file}:{call}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[:5] == [
        "importing",
        f"{file}:{call}",
        "",
        f"formula     {formula}",
        f"e_lambda    {e_lambda}",
    ]
    assert words in " ".join(line[12:] for line in lines[6:])
    assert sys.path == path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Simam", r"attention.py has no class Simam; it has SimAM"),
        ("helper", r"helper in .*attention.py is not a class of nn.Module; it has .*SimAM"),
        ("Plain", r"Plain in .*attention.py is not a class of nn.Module"),
        (
            "Needy",
            r"Needy\(channels, e_lambda\) does not take these arguments \(missing a required "
            r"argument: 'channels'\); give them as literals in parentheses, such as "
            r"'.*attention.py:Needy\(64, e_lambda=0.1\)'",
        ),
        ("SimAM(1, 2, 3)", r"SimAM\(.*\) does not take these arguments \(too many"),
        ("SimAM(channels)", r"the arguments in .* must be literals, such as \(64, e_lambda"),
        ("SimAM(**{'a': 1})", r"the arguments in .* must be literals"),
        ("Strict(3)", r"Strict\(3\) cannot be built \(RuntimeError: channels must be odd\)"),
        (
            "TwoInputs",
            r"this TwoInputs takes no map of the kind \(N, C, H, W\): on an input of shape "
            r"2x8x5x7 it fails \(TypeError: .*'y'\)",
        ),
    ],
)
def test_identify_explains_errors_of_the_class(
    call: str, message: str, file: str, capsys: Capture
) -> None:
    assert main(["identify", f"{file}:{call}"]) == 2
    out, err = capsys.readouterr()
    assert out in ("", "importing\n")
    assert err.startswith("simam: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_identify_explains_errors_of_the_file(tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "missing.py"
    assert error_message(capsys, "identify", f"{missing}:A") == f"there is no file {missing}"
    message = error_message(capsys, "identify", "SimAM")
    assert message.startswith("expected FILE.py:CLASS or 'FILE.py:CLASS(ARGUMENTS)', got 'SimAM'")
    for text, reason in {
        "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
        "def f(:": "SyntaxError: ",
        "raise SystemExit(3)": "it exits instead",
    }.items():
        broken = tmp_path / "broken.py"
        broken.write_text(text)
        message = error_message(capsys, "identify", f"{broken}:A")
        assert message.startswith(f"{broken} cannot be imported")
        assert reason in message
    empty = tmp_path / "empty.py"
    empty.touch()
    message = error_message(capsys, "identify", f"{empty}:A")
    assert message == f"{empty} has no class A; it defines no nn.Module"


def test_identify_imports_a_file_as_a_part_of_its_package(tmp_path: Path, capsys: Capture) -> None:
    package = tmp_path / "some_network" / "layers"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "base.py").write_text(SOURCE.replace("from neighbour import HALF", "HALF = 0.5"))
    (package / "attention.py").write_text("from .base import SimAM\nclass Mine(SimAM): pass\n")
    try:
        assert main(["identify", f"{package / 'attention.py'}:Mine"]) == 0
    finally:
        for name in [name for name in sys.modules if name.startswith("some_network")]:
            del sys.modules[name]
    assert "formula     shared" in capsys.readouterr().out


def test_identify_help_says_that_the_code_runs(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["identify", "--help"])
    assert "runs its code" in " ".join(capsys.readouterr().out.split())
