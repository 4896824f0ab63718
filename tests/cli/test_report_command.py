"""`simam report`: what it shows of real models, its JSON, and what it says of mistakes."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="the report is on models of torchvision and timm")
pytest.importorskip("timm", reason="the report is on models of torchvision and timm")

import torchvision

import simam
from simam.cli import main
from simam.cli.models import Subject, build
from tests.helpers.command import INSTALL, SMALL, Capture, message, mistake, report


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before counts


@pytest.mark.parametrize(
    ("model", "parameters", "multiply_adds", "places"),
    [  # the paper's
        ("resnet18", "11.69", "1.82", 8),
        ("resnet50", "25.56", "4.11", 16),
        ("mobilenet_v2", "3.50", "0.31", 17),
    ],
)
def test_counts_are_those_of_the_paper(
    model: str, parameters: str, multiply_adds: str, places: int, capsys: Capture
) -> None:
    found = report(capsys, model)
    assert len(found["insertions"]) == places
    for when in ("before", "after"):
        assert f"{found['parameters'][when] / 1e6:.2f}" == parameters
        assert f"{found['multiply_adds'][when] / 1e9:.2f}" == multiply_adds


def test_shapes_of_resnet18(capsys: Capture) -> None:
    found = report(capsys, "resnet18", "--batch", "2")
    sizes = {1: [64, 56, 56], 2: [128, 28, 28], 3: [256, 14, 14], 4: [512, 7, 7]}
    expected = {f"layer{i}.{j}.conv2": [2, *sizes[i]] for i in sizes for j in (0, 1)}
    assert found["input_shape"] == [2, 3, 224, 224]
    assert {place["path"]: place["shape"] for place in found["insertions"]} == expected
    assert [place["calls"] for place in found["insertions"]] == [1] * 8
    assert found["elements"] == 2 * 2 * sum(c * h * w for c, h, w in sizes.values())


def test_json(capsys: Capture) -> None:
    found = report(capsys, SMALL, "--e-lambda", "0.1", "--statistics", "leave_one_out")
    assert list(found) == [
        "model", "library", "weights", "input_shape", "takes", "e_lambda", "statistics",
        "insertions", "unanalysed", "elements", "parameters", "multiply_adds", "forward_ms",
        "ratio", "ratio_quartiles", "repeats", "threads", "versions",
    ]  # fmt: skip
    assert found["model"] == "test_resnet"
    assert found["library"] == "timm"
    assert found["weights"] is None
    assert found["input_shape"] == [1, 3, 160, 160]  # timm's own for it
    assert (found["e_lambda"], found["statistics"]) == (0.1, "leave_one_out")
    assert found["insertions"][0] == {
        "path": "layer1.0.conv2",
        "block": "layer1.0",
        "conv": "Conv2d 3x3",
        "reason": simam.plan(build(SMALL).model)[0].reason,
        "shape": [1, 32, 40, 40],
        "calls": 1,
        "elements": 32 * 40 * 40,
    }
    assert set(found["forward_ms"]) == {"before", "after", "before_quartiles", "after_quartiles"}
    assert found["ratio"] == found["forward_ms"]["after"] / found["forward_ms"]["before"]
    assert found["repeats"] == 1
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["simam"] == simam.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"simam", "torch", "timm"}


def test_text(capsys: Capture) -> None:
    assert main(["report", "--repeats", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "resnet18 of torchvision, weights: random"
    assert lines[1] == "SimAM(e_lambda=0.0001, statistics='shared'); input 1x3x224x224"
    assert lines[2].endswith(f", torchvision {torchvision.__version__}; 1 thread")
    assert lines[4:6] == [
        "SimAM after      convolution   output",
        "layer1.0.conv2   Conv2d 3x3    1x64x56x56",
    ]
    assert re.search(r"^parameters +11\.69 M +11\.69 M +1\.00$", out, re.MULTILINE)
    assert re.search(r"^multiply-adds +1\.82 G +1\.82 G +1\.00$", out, re.MULTILINE)
    number = r"\d+\.\d+"
    assert re.search(rf"^time +{number} ms +{number} ms +{number}$", out, re.MULTILINE)
    span = rf"{number} to {number}"
    assert re.search(rf"^  middle half +{span} +{span} +{span}$", out, re.MULTILINE)
    assert "2 pairs" in out
    assert "0.75 M values" in out
    assert max(map(len, lines)) <= 100


def test_text_names_what_was_not_analysed_and_why_counts_differ(capsys: Capture) -> None:
    model = "fasterrcnn_mobilenet_v3_large_320_fpn"
    assert main(["report", model, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "; input 1x3x320x320 as a list of images\n" in out
    assert "Not analysed, so without SimAM:\n  backbone.fpn: FeaturePyramidNetwork" in out
    before, after = re.search(r"^multiply-adds +(\S+) G +(\S+) G", out, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert before == after or "They differ where" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "input_shape", "shape"),
    [
        (["r3d_18", "--input-size", "32"], [1, 3, 16, 32, 32], [1, 64, 16, 16, 16]),
        (["r3d_18", "--input-size", "3", "8", "16", "16"], [1, 3, 8, 16, 16], [1, 64, 8, 8, 8]),
        (["raft_small"], [1, 3, 128, 128], [2, 8, 64, 64]),  # both images in one batch
        (["deeplabv3_resnet50", "--input-size", "32"], [1, 3, 32, 32], [1, 64, 8, 8]),
        (["timm/convnext_atto", "--input-size", "32"], [1, 3, 32, 32], [1, 40, 8, 8]),
        ([SMALL, "--input-size", "3", "32", "48"], [1, 3, 32, 48], [1, 32, 8, 12]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_kinds_of_input(
    arguments: list[str], input_shape: list[int], shape: list[int], capsys: Capture
) -> None:
    found = report(capsys, *arguments)
    assert found["input_shape"] == input_shape
    assert found["insertions"][0]["shape"] == shape


@pytest.mark.parametrize(
    ("name", "input_size", "takes"),
    [
        ("efficientnet_b3", (3, 300, 300), "batch"),  # of its published weights
        ("vit_b_16", (3, 224, 224), "batch"),  # the smallest of them
        ("timm/efficientnet_b3", (3, 288, 288), "batch"),
        ("mvit_v2_s", (3, 16, 224, 224), "batch"),
        ("fasterrcnn_resnet50_fpn", (3, 800, 800), "list"),  # to which it resizes its images
        ("raft_large", (3, 128, 128), "pair"),
    ],
)
def test_input_of_a_model(name: str, input_size: tuple[int, ...], takes: str) -> None:
    with torch.device("meta"):
        subject = build(name)
    assert (subject.input_size, subject.takes) == (input_size, takes)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("resnet18", "torchvision"),
        ("torchvision/resnet18", "torchvision"),
        ("timm/resnet18", "timm"),
        ("test_resnet", "timm"),
        ("resnet18.a1_in1k", "timm"),
    ],
)
def test_library_of_a_name(name: str, library: str) -> None:
    assert build(name).library == library


def test_where_and_exclude(capsys: Capture) -> None:
    found = report(capsys, "--where", "layer1.*", "layer2.0.*", "--exclude", "*.conv1",
                   "*downsample*", "--input-size", "32")  # fmt: skip
    paths = [place["path"] for place in found["insertions"]]
    assert paths == ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2"]


def test_models_and_inputs_are_the_same_every_time() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = build(SMALL)
        torch.manual_seed(2)
        second = build(SMALL)
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key])
    assert torch.equal(first.inputs((1, 3, 4, 4))[0], second.inputs((1, 3, 4, 4))[0])


def test_build_leaves_the_random_state_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        build(SMALL)
        assert torch.equal(torch.get_rng_state(), state)


def test_warnings_of_the_libraries_are_not_passed_on(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object) -> Subject:
        warnings.warn("of a library", stacklevel=1)
        return build(SMALL)

    monkeypatch.setattr("simam.cli.build", warn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report(capsys, "--input-size", "32")
    assert not seen


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["report", SMALL, "--repeats", "1", "--input-size", "32"]) == 0
    assert ("timing" in screen.getvalue()) == terminal
    assert bool(screen.getvalue()) == terminal


def test_unknown_model_lists_close_names(capsys: Capture) -> None:
    told = mistake(capsys, "ResNet19")
    assert told.startswith("unknown model 'ResNet19'; close names: resnet18, ")
    assert re.search(r"\bresnet152\b.* \(torchvision\); .*\bresnet18d\b.* \(timm\)$", told)


def test_unknown_model_of_one_library(capsys: Capture) -> None:
    assert mistake(capsys, "timm/mobilnetv2_100").startswith(
        "unknown model 'mobilnetv2_100'; close names: mobilenetv2_100, "
    )
    assert "timm" not in mistake(capsys, "torchvision/resnet19")
    assert mistake(capsys, "torchvision/xyz") == (
        "unknown model 'xyz'; close names: none (torchvision)"
    )


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "timm/hf-hub:timm/resnet18"])
def test_names_that_would_need_the_network_are_unknown(name: str, capsys: Capture) -> None:
    assert mistake(capsys, name).startswith("unknown model 'hf-hub:timm/resnet18")


def missing(package: str) -> str:
    return (
        f"{package} cannot be imported (ModuleNotFoundError: import of {package} halted; "
        f"None in sys.modules): {INSTALL}"
    )


@pytest.mark.parametrize(
    ("packages", "name", "told"),
    [
        (["timm"], "timm/resnet18", missing("timm")),
        (["torchvision"], "torchvision/resnet18", missing("torchvision")),
        (
            ["torchvision", "timm"],
            "resnet18",
            f"{missing('torchvision')}. {missing('timm')}",
        ),
        (
            ["timm"],
            "swin_x",
            "unknown model 'swin_x'; close names: swin_t, swin_s, swin_b, swin3d_t, swin3d_s "
            f"(torchvision). {missing('timm')}",
        ),
    ],
)
def test_missing_library(
    packages: list[str], name: str, told: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    assert mistake(capsys, name) == told


def test_one_library_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        assert build("resnet18").library == "torchvision"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        assert build("resnet18").library == "timm"


def test_tqdm_is_not_needed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    report(capsys, SMALL, "--input-size", "32")


POSITIVE = "expected a whole number from 1 on, got"
HELP = "; see simam report --help"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["vgg11"],
            "found no place for SimAM in this VGG: no residual block whose branch holds a spatial "
            "(kernel > 1) convolution and a non-linearity. Choose convolutions with --where, for "
            "example --where 'features.*'.",
        ),
        (
            [SMALL, "--where", "layr1.*"],
            r"--where 'layr1.*' matches none of the model's convolutions; close to it: layer1.",
        ),
        ([SMALL, "--exclude", "nosuch"], "--exclude 'nosuch' matches none of the planned places"),
        (
            [SMALL, "--exclude", "*"],
            "--exclude ['*'] leaves out every place; nothing to attach",
        ),
        (
            [SMALL, "--input-size", "2", "2"],
            "the input size of test_resnet is one number or 3, such as 3 160 160, got 2 2",
        ),
        (
            ["r3d_18", "--input-size", "3", "32", "32"],
            "the input size of r3d_18 is one number or 4, such as 3 16 112 112, got 3 32 32",
        ),
        (
            [SMALL, "--input-size", "5", "32", "32"],
            "test_resnet cannot take an input of shape 1x5x32x32 (RuntimeError: Given groups=1, ",
        ),
        (
            ["raft_small", "--input-size", "64"],
            "raft_small cannot take an input of shape 1x3x64x64 (ValueError: Feature maps are too ",
        ),
        (["--input-size", "0"], f"argument --input-size: {POSITIVE} '0'{HELP}"),
        (["--input-size", "x"], f"argument --input-size: {POSITIVE} 'x'{HELP}"),
        (["--batch", "-1"], f"argument --batch: {POSITIVE} '-1'{HELP}"),
        (["--batch", "1.5"], f"argument --batch: {POSITIVE} '1.5'{HELP}"),
        (["--repeats", "0"], f"argument --repeats: {POSITIVE} '0'{HELP}"),
        (
            ["--e-lambda", "-0.1"],
            "argument --e-lambda: e_lambda must be a positive, finite number, got -0.1; "
            "the authors use 1e-4 (CIFAR) and 0.1 (ImageNet)",
        ),
        (["--e-lambda", "nan"], "argument --e-lambda: e_lambda must be a positive, finite number"),
        (["--e-lambda", "x"], f"argument --e-lambda: expected a number, got 'x'{HELP}"),
        (["--statistics", "exact"], "argument --statistics: invalid choice: 'exact' (choose from "),
        (["--nosuch"], "unrecognized arguments: --nosuch; see simam --help"),
        (["a", "b"], "unrecognized arguments: b; see simam --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(arguments: list[str], told: str, capsys: Capture) -> None:
    assert mistake(capsys, *arguments).startswith(told)


def test_what_to_do_about_an_input_size(capsys: Capture) -> None:
    told = mistake(capsys, SMALL, "--input-size", "5", "32", "32")
    assert told.endswith("); give another --input-size than 5 32 32")


def test_unknown_command(capsys: Capture) -> None:
    told = message(capsys, "rapport")
    choice = r"argument COMMAND: invalid choice: 'rapport' \(choose from '?report'?, '?maps'?\)"
    assert re.match(choice, told)


def test_help_without_arguments(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: simam ")
    assert "report" in out
    assert err == ""


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"simam {simam.__version__}\n"


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simam.cli.build", interrupt)
    assert main(["report"]) == 130


def test_as_a_module() -> None:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simam", "report", "resnet18", "--repeats", "1", "--json"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread)
    found = json.loads(run.stdout)
    assert found["parameters"] == {"before": 11689512, "after": 11689512}

    run = subprocess.run([*command[:4], "nosuch"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("simam: error: unknown model 'nosuch'; close names: ")


def test_the_command_brings_no_model_library() -> None:
    optional = {"timm", "torchvision", "tqdm", "safetensors", "matplotlib", "PIL"}
    program = "import sys; {}; print(*sys.modules)"
    brought = [
        set(
            subprocess.run(
                [sys.executable, "-c", program.format(statement)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()
        )
        for statement in ("import torch", "import simam.cli")
    ]
    assert brought[1] & optional <= brought[0]
