"""Reading of state dicts from files: what stands beside the weights, and refusals of code."""

import argparse
import os
import pickle
import shlex
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import simam
from simam.state_dict import load_strictly
from simam.weights_file import read


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


def attached() -> nn.Sequential:
    return simam.attach(plain(), where="0")


def numpy_values() -> list[Any]:
    numpy = pytest.importorskip("numpy", reason="makes the values")
    kinds = ("float64", "float32", "int64", "bool_", "str_")
    return [*(getattr(numpy, kind)(1) for kind in kinds), numpy.ones((2, 3))]


@pytest.mark.parametrize("names", [b"numpy._core", b"numpy.core"], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("is_installed", [True, False])
def test_read_skips_numpy_beside_the_weights(
    names: bytes, is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, file = attached().state_dict(), tmp_path / "file.pth"
    content = {"best_acc": numpy_values(), "state_dict": state}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    written = file.read_bytes()
    assert written.count(b"numpy._core") + written.count(b"numpy.core") >= 2
    file.write_bytes(written.replace(b"numpy._core", names).replace(b"numpy.core", names))
    if not is_installed:
        monkeypatch.setitem(sys.modules, "numpy", None)
    found = read(file)
    assert list(found) == list(state)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_read_skips_argparse_namespace(tmp_path: Path) -> None:
    options = argparse.Namespace(lr=0.1, nested=argparse.Namespace(milestones=[82, 123]))
    torch.save({"args": options, "model": plain().state_dict()}, tmp_path / "file.pth")
    allowed = set(torch.serialization.get_safe_globals())
    assert list(read(tmp_path / "file.pth")) == list(plain().state_dict())
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_read_names_a_value_in_place_of_a_tensor(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="makes the value")
    torch.save({"state_dict": {"weight": numpy.ones(2)}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"holds 'weight' with a numpy array, expected"):
        read(tmp_path / "file.pth")


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


class Call:
    """Calls a class that is allowed with a payload, as the first or as the second argument."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return argparse.Namespace, self.arguments


@pytest.mark.parametrize(
    "hide",
    [
        lambda payload: argparse.Namespace(lr=payload),
        lambda payload: Call(payload),
        lambda payload: [argparse.Namespace(), payload],
    ],
)
def test_read_refuses_code_among_values_that_it_skips(
    hide: Callable[[Payload], object], tmp_path: Path
) -> None:
    file, trace = tmp_path / "file.pth", tmp_path / "ran"
    torch.save({"args": hide(Payload(trace)), "model": plain().state_dict()}, file)
    with pytest.raises(ValueError, match=r"is refused: it asks for \w+\.mkdir\. A file"):
        read(file)
    assert not trace.exists()


def other_library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with classes that a file may hold, as mmengine's HistoryBuffer or a detector."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values = [1.0]

    class Detector(nn.Sequential):
        pass

    module: Any = types.ModuleType("other_library")
    for kind in (HistoryBuffer, Detector):
        kind.__module__, kind.__qualname__ = "other_library", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "other_library", module)
    return module


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda library, model: {
                "message_hub": {"loss": library.HistoryBuffer()},
                "state_dict": model.state_dict(),
            },
            "it asks for other_library.HistoryBuffer. A file that holds more than tensors could "
            "run code",
        ),
        (
            lambda library, model: library.Detector(*model),
            "it asks for other_library.Detector. A file that holds more than tensors could run "
            "code",
        ),
        (
            lambda library, model: {"epoch": 3, "model": library.Detector(*model)},
            "it asks for other_library.Detector. A file that holds more than tensors could run "
            "code",
        ),
        (
            lambda _, model: model.state_dict(),
            "its pickle protocol is not the default of torch.save, and is not read safely",
        ),
    ],
    ids=["HistoryBuffer", "whole model", "model in a dict", "protocol 4"],
)
def test_read_says_how_to_save_the_weights_alone(
    make: Callable[[Any, nn.Module], Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, library = attached(), other_library(monkeypatch)
    file = tmp_path / "a trained model.pth.tar"
    protocol = 4 if "protocol" in reason else 2
    torch.save(make(library, model), file, pickle_protocol=protocol)
    with pytest.raises(ValueError, match="is refused") as caught:
        read(file)
    start = (
        f"{file} is refused: {reason}; if you trust the file, save its weights alone, where its "
        "libraries are installed: "
    )
    assert str(caught.value).startswith(f"{start}python -c")
    python, option, code = shlex.split(str(caught.value).removeprefix(start))
    assert (python, option) == ("python", "-c")
    exec(code)
    found = read(tmp_path / "a trained model.pth-weights.pt")
    assert list(found) == list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(model, found, "a file")


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}, protocol=4), b"PK", b""])
def test_read_gives_no_command_for_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match="is refused") as caught:
        read(tmp_path / "file.pth")
    assert "python -c" not in str(caught.value)
