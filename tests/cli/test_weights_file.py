"""`simam report --weights FILE`: what it loads, and what it refuses without running it."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm", reason="timm builds the network")

from simam.cli.models import build
from simam.messages import UserError
from tests.helpers.command import INSTALL, SMALL, Capture, mistake, report


def state_of(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = build(SMALL).model.state_dict()
    return {
        key: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        without_counts,  # files of torch before 0.4.1
    ],
    ids=["plain", "state_dict", "model", "DataParallel", "old"],
)
def test_weights_are_loaded(
    form: Callable[[dict[str, Tensor]], object], tmp_path: Path, capsys: Capture
) -> None:
    state = state_of()
    file = str(tmp_path / "weights.pt")
    torch.save(form(state), file)
    loaded = build(SMALL, file).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert report(capsys, SMALL, "--input-size", "32", "--weights", file)["weights"] == file


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="timm brings it")
    state, file = state_of(), str(tmp_path / "weights.safetensors")
    safetensors.save_file(state, file)
    loaded = build(SMALL, file).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_weights_that_do_not_fit(tmp_path: Path, capsys: Capture) -> None:
    state = state_of()
    number = len(state)
    for key in ("bn1.weight", "bn1.bias", "conv1.0.weight", "fc.bias"):
        del state[key]
    state |= {"head.weight": torch.ones(2), "fc.weight": torch.ones(10, 5)}
    file = str(tmp_path / "weights.pt")
    torch.save(state, file)
    assert mistake(capsys, SMALL, "--weights", file) == (
        f"the weights in {file} are not those of this model, which has {number} tensors; "
        "4 missing: conv1.0.weight, bn1.weight, bn1.bias, ...; 1 unexpected: head.weight; "
        "1 of another shape: fc.weight (expected 1000x96, got 10x5). "
        "Name the model that they were saved from"
    )


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: Capture) -> None:
    file, trace = str(tmp_path / "weights.pt"), tmp_path / "ran"
    torch.save({"conv1.weight": Payload(trace)}, file)
    assert re.fullmatch(
        rf"{re.escape(file)} is refused: it asks for \w+\.mkdir\. A file that holds more than "
        r"tensors could run code; expected one written by torch\.save\(model\.state_dict\(\), "
        r"\.\.\.\) or a \.safetensors file",
        mistake(capsys, SMALL, "--weights", file),
    )
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the payload is live
    assert trace.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights" * 100])
def test_a_file_that_is_something_else(
    suffix: str, content: bytes, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    told = mistake(capsys, SMALL, "--weights", str(file))
    assert told.startswith(f"{file} is refused: ")
    assert told.endswith("torch.save(model.state_dict(), ...) or a .safetensors file")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3}, "holds 'epoch' with a int"),
        ({1: torch.ones(2)}, "holds 1 with a Tensor"),
        ({"state_dict": {"a": "b"}}, "holds 'a' with a str"),
    ],
)
def test_a_file_without_a_state_dict(
    content: object, told: str, tmp_path: Path, capsys: Capture
) -> None:
    file = str(tmp_path / "weights.pt")
    torch.save(content, file)
    assert mistake(capsys, SMALL, "--weights", file) == (
        f"{file} {told}, expected a state dict (names to tensors), by itself or as "
        '"state_dict" or "model" of a dict'
    )


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_file_that_is_missing(name: str, tmp_path: Path, capsys: Capture) -> None:
    file = str(tmp_path / name)
    assert mistake(capsys, SMALL, "--weights", file).startswith(f"cannot read {file}: No such file")


def test_a_folder_as_weights(tmp_path: Path, capsys: Capture) -> None:
    assert mistake(capsys, SMALL, "--weights", str(tmp_path)).startswith(
        f"cannot read {tmp_path}: "
    )


def test_missing_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=re.escape(INSTALL)):
        build(SMALL, "weights.safetensors")
