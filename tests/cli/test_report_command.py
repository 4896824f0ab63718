"""`simam report`: its figures for real models, its JSON, its text and its error messages."""

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
from simam import Plan, Unanalysed, plan
from simam.cli import main
from simam.cli.models import Subject, build
from tests.helpers.command import SMALL, Capture, error_message, report, report_error


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # hides files downloaded before


@pytest.mark.parametrize(
    ("model", "parameters", "multiply_adds", "insertions"),
    [  # as in the paper
        ("resnet18", "11.69", "1.82", 8),
        ("resnet50", "25.56", "4.11", 16),
        ("mobilenet_v2", "3.50", "0.31", 17),
    ],
)
def test_report_counts_match_the_paper(
    model: str, parameters: str, multiply_adds: str, insertions: int, capsys: Capture
) -> None:
    found = report(capsys, model)
    assert len(found["insertions"]) == insertions
    for when in ("before", "after"):
        assert f"{found['parameters'][when] / 1e6:.2f}" == parameters
        assert f"{found['multiply_adds'][when] / 1e9:.2f}" == multiply_adds


def test_report_shows_the_shapes_of_resnet18(capsys: Capture) -> None:
    found = report(capsys, "resnet18", "--batch", "2", "--input-size", "64")
    sizes = {1: [64, 16, 16], 2: [128, 8, 8], 3: [256, 4, 4], 4: [512, 2, 2]}
    expected = {f"layer{i}.{j}.conv2": [2, *sizes[i]] for i in sizes for j in (0, 1)}
    assert found["input_shape"] == [2, 3, 64, 64]
    assert {each["path"]: each["shape"] for each in found["insertions"]} == expected
    assert [each["calls"] for each in found["insertions"]] == [1] * 8
    assert found["elements"] == 2 * 2 * sum(c * h * w for c, h, w in sizes.values())


def test_report_json(capsys: Capture) -> None:
    found = report(capsys, SMALL, "--e-lambda", "0.1", "--statistics", "leave_one_out")
    assert list(found) == [
        "model", "library", "weights", "input_shape", "takes", "e_lambda", "statistics", "place",
        "insertions", "unanalysed", "elements", "parameters", "multiply_adds", "forward_ms",
        "ratio", "ratio_quartiles", "repeats", "threads", "versions",
    ]  # fmt: skip
    assert found["model"] == "test_resnet"
    assert found["library"] == "timm"
    assert found["weights"] is None
    assert found["input_shape"] == [1, 3, 160, 160]  # the default of timm
    assert (found["e_lambda"], found["statistics"]) == (0.1, "leave_one_out")
    assert found["insertions"][0] == {
        "path": "layer1.0.conv2",
        "block": "layer1.0",
        "host": "Conv2d 3x3",
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


def test_report_text(capsys: Capture) -> None:
    assert main(["report", "--repeats", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "resnet18 of torchvision, weights: random"
    assert lines[1] == "SimAM(e_lambda=0.0001, statistics='shared'); input 1x3x224x224"
    assert lines[2].endswith(f", torchvision {torchvision.__version__}; 1 thread")
    assert lines[4:6] == [
        "SimAM after      host         output",
        "layer1.0.conv2   Conv2d 3x3   1x64x56x56",
    ]
    assert re.search(r"^parameters +11\.69 M +11\.69 M +1\.00$", out, re.MULTILINE)
    assert re.search(r"^multiply-adds +1\.82 G +1\.82 G +1\.00$", out, re.MULTILINE)
    number = r"\d+\.\d+"
    assert re.search(rf"^time +{number} ms +{number} ms +{number}$", out, re.MULTILINE)
    span = rf"{number} to {number}"
    assert re.search(rf"^  quartiles +{span} +{span} +{span}$", out, re.MULTILINE)
    assert "2 pairs" in out
    assert "0.75 M values" in out
    assert max(map(len, lines)) <= 100


def test_report_text_names_blocks_not_analysed_and_why_counts_differ(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = [Unanalysed("backbone.fpn", "FeaturePyramidNetwork, TraceError")]
    monkeypatch.setattr(
        "simam.cli.report.plan", lambda model, **options: Plan(plan(model, **options), left_out)
    )
    model = "fasterrcnn_mobilenet_v3_large_320_fpn"
    assert main(["report", model, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "; input 1x3x320x320 as a list of images\n" in out
    assert "Not analysed, so without SimAM:\n  backbone.fpn: FeaturePyramidNetwork" in out
    before, after = re.search(r"^multiply-adds +(\S+) G +(\S+) G", out, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert before == after or "The counts differ if" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "input_shape", "shape"),
    [
        (["mc3_18", "--input-size", "32"], [1, 3, 16, 32, 32], [1, 64, 16, 16, 16]),
        (["mc3_18", "--input-size", "3", "8", "16", "16"], [1, 3, 8, 16, 16], [1, 64, 8, 8, 8]),
        (["raft_small"], [1, 3, 128, 128], [2, 8, 64, 64]),  # both images in one batch
        (["lraspp_mobilenet_v3_large", "--input-size", "32"], [1, 3, 32, 32], [1, 16, 16, 16]),
        (["timm/convnext_atto", "--input-size", "32"], [1, 3, 32, 32], [1, 40, 8, 8]),
        ([SMALL, "--input-size", "3", "32", "48"], [1, 3, 32, 48], [1, 32, 8, 12]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_report_accepts_every_kind_of_input(
    arguments: list[str], input_shape: list[int], shape: list[int], capsys: Capture
) -> None:
    found = report(capsys, *arguments)
    assert found["input_shape"] == input_shape
    assert found["insertions"][0]["shape"] == shape


@pytest.mark.parametrize(
    ("name", "input_size", "takes"),
    [
        ("efficientnet_b3", (3, 300, 300), "batch"),  # crop size of its published weights
        ("vit_b_16", (3, 224, 224), "batch"),  # the smallest crop size of its published weights
        ("timm/efficientnet_b3", (3, 288, 288), "batch"),
        ("mvit_v2_s", (3, 16, 224, 224), "batch"),
        ("fasterrcnn_resnet50_fpn", (3, 800, 800), "list"),  # the size to which it resizes images
        ("raft_large", (3, 128, 128), "pair"),
    ],
)
def test_build_gives_the_input_size_of_the_model(
    name: str, input_size: tuple[int, ...], takes: str
) -> None:
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
def test_build_finds_the_library_of_a_name(name: str, library: str) -> None:
    assert build(name).library == library


def test_report_takes_place(capsys: Capture) -> None:
    found = report(capsys, SMALL, "--place", "branch")
    assert found["place"] == "branch"
    assert {i["host"] for i in found["insertions"]} == {"BatchNorm2d"}
    assert all(i["reason"].startswith("end of the residual") for i in found["insertions"])


def test_report_takes_where_and_exclude(capsys: Capture) -> None:
    found = report(capsys, "--where", "layer1.*", "layer2.0.*", "--exclude", "*.conv1",
                   "*downsample*", "--input-size", "32")  # fmt: skip
    paths = [each["path"] for each in found["insertions"]]
    assert paths == ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2"]


def test_build_gives_the_same_model_and_inputs_every_time() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = build(SMALL)
        torch.manual_seed(2)
        second = build(SMALL)
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key])
    assert torch.equal(first.inputs((1, 3, 4, 4))[0], second.inputs((1, 3, 4, 4))[0])


def test_build_leaves_the_random_state_unchanged() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        build(SMALL)
        assert torch.equal(torch.get_rng_state(), state)


def test_report_hides_warnings_of_libraries(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object) -> Subject:
        warnings.warn("of a library", stacklevel=1)
        return build(SMALL)

    monkeypatch.setattr("simam.cli.commands.build", warn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report(capsys, "--input-size", "32")
    assert not seen


@pytest.mark.parametrize("terminal", [True, False])
def test_report_shows_progress_only_on_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["report", SMALL, "--repeats", "1", "--input-size", "32"]) == 0
    assert ("timing" in screen.getvalue()) == terminal
    assert bool(screen.getvalue()) == terminal


def test_report_lists_names_close_to_an_unknown_model(capsys: Capture) -> None:
    message = report_error(capsys, "ResNet19")
    assert message.startswith("unknown model 'ResNet19'; close names: resnet18, ")
    assert re.search(r"\bresnet152\b.* \(torchvision\); .*\bresnet18d\b.* \(timm\)$", message)


def test_report_lists_close_names_of_the_given_library(capsys: Capture) -> None:
    assert report_error(capsys, "timm/mobilnetv2_100").startswith(
        "unknown model 'mobilnetv2_100'; close names: mobilenetv2_100, "
    )
    assert "timm" not in report_error(capsys, "torchvision/resnet19")
    assert report_error(capsys, "torchvision/xyz") == (
        "unknown model 'xyz'; close names: none (torchvision)"
    )


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "timm/hf-hub:timm/resnet18"])
def test_report_refuses_names_that_need_the_network(name: str, capsys: Capture) -> None:
    assert report_error(capsys, name).startswith("unknown model 'hf-hub:timm/resnet18")


def missing(package: str) -> str:
    """The error message for a package that cannot be imported."""
    return (
        f"{package} cannot be imported (ModuleNotFoundError: import of {package} halted; "
        'None in sys.modules); install the extra "timm": pip install "simam[timm]", '
        'or from a checkout pip install ".[timm]"'
    )


@pytest.mark.parametrize(
    ("packages", "name", "message"),
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
def test_report_names_the_extra_of_a_missing_library(
    packages: list[str], name: str, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    assert report_error(capsys, name) == message


def test_build_works_with_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        assert build("resnet18").library == "torchvision"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        assert build("resnet18").library == "timm"


def test_report_works_without_tqdm(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    report(capsys, SMALL, "--input-size", "32")


POSITIVE = "expected a positive integer, got"
HELP = "; see simam report --help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["squeezenet1_1"],
            "found no place for SimAM in this SqueezeNet: no residual block whose branch holds a "
            "spatial (kernel > 1) convolution and a non-linearity. Choose hosts with "
            "--where, for example --where 'features.12.expand3x3'.",
        ),
        (
            [SMALL, "--where", "layr1.*"],
            r"--where 'layr1.*' matches none of the model's modules; close to it: layer1.",
        ),
        (
            [SMALL, "--exclude", "nosuch"],
            "--exclude 'nosuch' matches none of the planned insertions",
        ),
        (
            [SMALL, "--exclude", "*"],
            "--exclude ['*'] leaves out every insertion; nothing to attach",
        ),
        (
            [SMALL, "--input-size", "2", "2"],
            "the input size of test_resnet must be 1 or 3 numbers, such as 3 160 160, got 2 2",
        ),
        (
            ["mc3_18", "--input-size", "3", "32", "32"],
            "the input size of mc3_18 must be 1 or 4 numbers, such as 3 16 112 112, got 3 32 32",
        ),
        (
            [SMALL, "--input-size", "5", "32", "32"],
            "test_resnet fails on an input of shape 1x5x32x32 (RuntimeError: Given groups=1, ",
        ),
        (
            ["raft_small", "--input-size", "64"],
            "raft_small fails on an input of shape 1x3x64x64 (ValueError: Feature maps are too ",
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
        (["--place", "bn"], "argument --place: invalid choice: 'bn' (choose from "),
        (
            ["--place", "norm", "--where", "layer1.0.bn2"],
            "--where names the hosts, so --place 'norm' has no meaning beside it",
        ),
        (["--statistics", "exact"], "argument --statistics: invalid choice: 'exact' (choose from "),
        (["--nosuch"], "unrecognized arguments: --nosuch; see simam --help"),
        (["a", "b"], "unrecognized arguments: b; see simam --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_report_refuses_invalid_options(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    assert report_error(capsys, *arguments).startswith(message)


def test_report_suggests_another_input_size(capsys: Capture) -> None:
    message = report_error(capsys, SMALL, "--input-size", "5", "32", "32")
    assert message.endswith("); choose an --input-size other than 5 32 32")


def test_command_refuses_unknown_commands(capsys: Capture) -> None:
    message = error_message(capsys, "rapport")
    choice = r"argument COMMAND: invalid choice: 'rapport' \(choose from '?report'?, '?maps'?, '?id"
    assert re.match(choice, message)


def test_command_prints_help_without_arguments(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: simam ")
    assert "report" in out
    assert err == ""


def test_command_prints_its_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"simam {simam.__version__}\n"


def test_command_exits_with_130_if_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simam.cli.commands.build", interrupt)
    assert main(["report"]) == 130


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=one_thread)


def test_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "simam", "report", "resnet18"]
    finished = run(*command, "--repeats", "1", "--input-size", "32", "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    found = json.loads(finished.stdout)
    assert found["parameters"] == {"before": 11689512, "after": 11689512}

    finished = run(*command, "--batch", "0")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        f"simam: error: argument --batch: {POSITIVE} '0'; see simam report --help\n"
    )


def test_command_help_needs_torch_alone() -> None:
    program = """
import sys
import torch  # which may import some optional packages itself
from importlib import import_module

OPTIONAL = {"PIL", "matplotlib", "safetensors", "timm", "torchvision", "tqdm"}
attempts = []


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            attempts.append(name)
            raise ModuleNotFoundError(name)


for name in list(sys.modules):
    if name.partition(".")[0] in OPTIONAL:
        del sys.modules[name]
sys.meta_path.insert(0, Blocker())

import simam.cli

for arguments in ([], ["--help"], ["report", "--help"], ["maps", "--help"]):
    try:
        assert simam.cli.main(arguments) == 0
    except SystemExit as exit_:
        assert exit_.code == 0
assert not attempts, attempts

for name in OPTIONAL:  # the blocker blocks
    try:
        import_module(name)
    except ModuleNotFoundError:
        pass
assert set(attempts) == OPTIONAL, attempts
"""
    finished = run(sys.executable, "-c", program)
    assert (finished.returncode, finished.stderr) == (0, "")
    for text in ("COMMAND", "--input-size N", "--layers GLOB"):
        assert text in finished.stdout
