"""`--weights FILE`: which files are loaded, and which are refused without running their code."""

import argparse
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

import simam
from simam.cli import main
from simam.cli.models import build, load_weights
from simam.messages import UserError
from tests.helpers.command import SMALL, Capture, report, report_error


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
        without_counts,  # as in files of torch before 0.4.1
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: state | {"total_ops": torch.zeros(1), "bn1.total_params": torch.zeros(1)},
    ],
    ids=["plain", "state_dict", "model", "DataParallel", "old", "args", "thop"],
)
def test_load_weights_accepts_every_form_of_file(
    form: Callable[[dict[str, Tensor]], object], tmp_path: Path, capsys: Capture
) -> None:
    state = state_of()
    file = str(tmp_path / "weights.pt")
    torch.save(form(state), file)
    loaded = build(SMALL, file).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert report(capsys, SMALL, "--input-size", "32", "--weights", file)["weights"] == file


def test_load_weights_accepts_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="timm brings it")
    state, file = state_of(), str(tmp_path / "weights.safetensors")
    safetensors.save_file(state, file)
    loaded = build(SMALL, file).model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_load_weights_refuses_weights_that_do_not_fit(tmp_path: Path, capsys: Capture) -> None:
    state = state_of()
    number = len(state)
    for key in ("bn1.weight", "bn1.bias", "conv1.0.weight", "fc.bias"):
        del state[key]
    state |= {"head.weight": torch.ones(2), "fc.weight": torch.ones(10, 5)}
    file = str(tmp_path / "weights.pt")
    torch.save(state, file)
    assert report_error(capsys, SMALL, "--weights", file) == (
        f"the weights in {file} are not those of this model, which has {number} tensors; "
        "4 missing: conv1.0.weight, bn1.weight, bn1.bias, and 1 more; 1 unexpected: head.weight; "
        "1 of another shape: fc.weight (expected 1000x96, got 10x5). "
        "Name the model that they were saved from"
    )


def test_load_weights_leaves_the_model_unchanged_by_a_file_it_refuses(tmp_path: Path) -> None:
    model = build(SMALL).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    state["fc.weight"] = torch.ones(10, 5)
    file = str(tmp_path / "weights.pt")
    torch.save(state, file)
    with pytest.raises(UserError, match=r"fc\.weight"):
        load_weights(model, file)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = [
        key
        for key, tensor in before.items()
        if after[key].numpy().tobytes() != tensor.numpy().tobytes()
    ]
    assert changed == []


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_load_weights_refuses_a_file_that_would_run_code(tmp_path: Path, capsys: Capture) -> None:
    file, trace = str(tmp_path / "weights.pt"), tmp_path / "ran"
    torch.save({"conv1.weight": Payload(trace)}, file)
    assert re.fullmatch(
        rf"{re.escape(file)} is refused: it asks for \w+\.mkdir\. A file that holds more than "
        r"tensors could run code; expected one written by torch\.save\(model\.state_dict\(\), "
        r"\.\.\.\) or a \.safetensors file",
        report_error(capsys, SMALL, "--weights", file),
    )
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the payload is live
    assert trace.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights" * 100])
def test_load_weights_refuses_other_files(
    suffix: str, content: bytes, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    message = report_error(capsys, SMALL, "--weights", str(file))
    assert message.startswith(f"{file} is refused: ")
    assert message.endswith("torch.save(model.state_dict(), ...) or a .safetensors file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3}, "holds 'epoch' with a int"),
        ({1: torch.ones(2)}, "holds 1 with a Tensor"),
        ({"state_dict": {"a": "b"}}, "holds 'a' with a str"),
    ],
)
def test_load_weights_refuses_a_file_without_a_state_dict(
    content: object, message: str, tmp_path: Path, capsys: Capture
) -> None:
    file = str(tmp_path / "weights.pt")
    torch.save(content, file)
    assert report_error(capsys, SMALL, "--weights", file) == (
        f"{file} {message}, expected a state dict (names to tensors), by itself or as "
        '"state_dict" or "model" of a dict'
    )


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_load_weights_names_a_missing_file(name: str, tmp_path: Path, capsys: Capture) -> None:
    file = str(tmp_path / name)
    assert report_error(capsys, SMALL, "--weights", file).startswith(
        f"cannot read {file}: No such file"
    )


def test_load_weights_refuses_a_folder(tmp_path: Path, capsys: Capture) -> None:
    assert report_error(capsys, SMALL, "--weights", str(tmp_path)).startswith(
        f"cannot read {tmp_path}: "
    )


def test_load_weights_names_the_extra_of_missing_safetensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=re.escape('pip install "simam[timm]"')):
        build(SMALL, "weights.safetensors")


def saved_with_simam(file: Path, e_lambda: float = 0.1) -> str:
    torch.save(simam.attach(build(SMALL).model, e_lambda=e_lambda).state_dict(), file)
    return str(file)


def test_load_weights_warns_of_other_layers_that_a_file_records(tmp_path: Path) -> None:
    file = saved_with_simam(tmp_path / "w.pt")
    model = simam.attach(build(SMALL).model, e_lambda=0.1)
    load_weights(model, file)  # a warning would be an error
    with pytest.warns(
        UserWarning, match=r"4 only in the file: layer1\.0\.conv2\.simam, "
    ) as caught:
        load_weights(simam.detach(model), file)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_report_command_accepts_weights_of_a_network_with_simam(
    tmp_path: Path, capsys: Capture
) -> None:
    # It compares the model without and with SimAM, whatever its weights were trained for.
    file = saved_with_simam(tmp_path / "w.pt")
    assert report(capsys, SMALL, "--input-size", "32", "--weights", file)["weights"] == file


def test_maps_command_warns_of_another_lambda_than_the_file_records(
    tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="draws the maps")
    image = pytest.importorskip("PIL.Image", reason="matplotlib brings it")
    image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    file = saved_with_simam(tmp_path / "w.pt")
    command = ["maps", SMALL, str(tmp_path / "image.png"), "-o", str(tmp_path / "out.svg")]
    assert main([*command, "--weights", file]) == 0
    assert capsys.readouterr().err.startswith(
        f"simam: warning: the weights in {file} were saved from a network with other SimAM layers, "
        "so outputs may differ from those in its training: 4 with other options: "
        "layer1.0.conv2.simam (e_lambda=0.1, "
    )
