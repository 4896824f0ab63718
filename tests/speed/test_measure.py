"""Benchmarks on tiny cases: the keys of their rows, and the tables made from stored rows."""

import importlib
import json
import math
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm builds the layers that simam is compared with")
torchvision_models = pytest.importorskip("torchvision.models", reason="it builds the models")
convert, gpu_models, gpu_op, models, op = (
    importlib.import_module(f"benchmarks.speed.{name}")
    for name in ("convert", "gpu_models", "gpu_op", "models", "op")
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiling takes seconds and is torch's; what is compiled runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield


def assert_positive(values: object) -> None:
    for value in values:
        assert math.isfinite(value)
        assert value > 0


@pytest.mark.parametrize("layout", op.LAYOUTS)
def test_op_measure_gives_the_documented_row(layout: str) -> None:
    row = op.measure("1x16x4x4", layout, 0.0)
    assert (row["shape"], row["layout"], row["bytes"]) == ("1x16x4x4", layout, 4 * 16 * 16)
    names = set(row["saved"])
    assert names >= {"copy", "sigmoid", "formula", "formula compiled", "simam", *op.TIMM}
    for kind in op.PASSES:
        assert set(row[kind]) == set(row[f"{kind} quartiles"]) == names
        assert_positive(row[kind].values())
        for name, (first, third) in row[f"{kind} quartiles"].items():
            assert 0 < first <= row[kind][name] <= third
        assert row[f"{kind} rounds"] >= 5
        assert_positive(op.ratios(row, kind, None).values())
    # Of a copy autograd saves nothing; simam saves x alone.
    assert (row["saved"]["copy"], row["saved"]["simam"]) == (0, 1)


class Tiny(nn.Module):
    """One residual block on a map of 14 x 14."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.block = Block()
        self.head = nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_models_measure_gives_the_documented_rows(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_models, "get_model", lambda name, weights: Tiny())
    names = {"formula", "simam", "reference"} if mode == "compiled" else {"formula", "simam"}
    rows = list(models.measure("tiny", mode, "channels_last", 0.0))
    assert [(row["task"], row["batch"]) for row in rows] == list(models.TASKS)
    for row in rows:
        assert (row["model"], row["mode"], row["layout"]) == ("tiny", mode, "channels_last")
        assert row["rounds"] >= 5
        assert set(row["ms"]) == {"plain", *names}
        assert set(row["ratio"]) == names
        for quartiles in (*row["ms"].values(), *row["ratio"].values()):
            assert_positive(quartiles)
            assert quartiles == sorted(quartiles)


def test_models_check_refuses_unexpected_outputs() -> None:
    x = torch.arange(1.0, 9.0)
    models.check({"plain": 2 * x, "simam": x, "formula": x})
    for name, wrong in (("plain", x), ("formula", 2 * x)):
        with pytest.raises(RuntimeError, match=f"^the output of {name} differs from that of simam"):
            models.check({"plain": 2 * x, "simam": x, "formula": x} | {name: wrong})


@pytest.mark.parametrize("task", ["inference", "training"])
def test_convert_measure_gives_the_documented_row(task: str) -> None:
    (row,) = convert.measure(0.0, ((task, 2, 64),))
    assert (row["task"], row["batch"], row["size"]) == (task, 2, 64)
    assert row["rounds"] >= 5
    names = ["plain", "copies", "converted"]
    assert list(row["ms"]) == list(row["ratio"]) == list(row["saved"]) == names
    for quartiles in (*row["ms"].values(), *row["ratio"].values()):
        assert_positive(quartiles)
        assert quartiles == sorted(quartiles)
    assert row["ratio"]["copies"] == [1.0, 1.0, 1.0]
    assert row["saved"]["plain"] < row["saved"]["converted"] < row["saved"]["copies"]
    lines = cells(convert.summary([row]))
    assert lines[1][:3] == [task, "2", "64"]


def test_convert_check_refuses_a_network_that_changed() -> None:
    networks = convert.variants()
    x = torch.rand(1, 3, 64, 64)
    convert.check(networks, x)
    with pytest.raises(RuntimeError, match=r"^expected 5 converted layers, got 0$"):
        convert.check(networks | {"converted": networks["copies"]}, x)
    networks["converted"][0][0].weight.data.mul_(2)
    networks["converted"][-1].bias.data.add_(1)
    with pytest.raises(RuntimeError, match=r"^the output after convert differs by "):
        convert.check(networks, x)


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_op_goal_table_marks_missed_goals() -> None:
    times = {"simam": 2.0, "sigmoid": 2.5, "formula": 11.0, "formula compiled": 4.0}
    row = {
        "shape": "8x64x56x56",
        "layout": "contiguous",
        "bytes": 6422528,
        "forward": times | {"simam bfloat16": 1.5},
        "forward+backward": times | {"simam bfloat16": 3.0},
        "saved": {"simam": 1.0},
    }
    small = row | {"shape": "1x16x4x4", "bytes": 1024}
    forward, both = cells(op.goal_table([row, small]))[3:]
    assert forward[:3] == ["8x64x56x56", "contiguous", "forward"]
    # formula, compiled, sigmoid, timm, contiguous, bfloat16 / float32, bytes
    assert " ".join(forward[3:]) == "0.182 0.500 ! 0.800 - - 0.750 1.000"
    assert " ".join(both[3:]) == "0.182 ! 0.500 ! 0.800 - - 1.500 ! 1.000"


def test_gpu_op_goal_table_marks_missed_goals() -> None:
    times = {"clone": 10.0, "simam": 11.0, "formula": 100.0, "formula compiled": 10.0}
    slow = times | {"simam": 22.0, "formula tuned": 44.0} | dict.fromkeys(gpu_op.TIMM, 44.0)
    row = {"shape": "4x64x512x512", "dtype": "bfloat16", "bytes": 134217728}
    rows = [
        row | {"layout": "contiguous", "forward": times, "backward": times},
        row | {"layout": "channels_last", "forward": slow, "backward": slow},
    ]
    _, *lines = cells(gpu_op.goal_table(rows))
    assert lines[0][:4] == ["4x64x512x512", "bfloat16", "contiguous", "forward"]
    # bandwidth (2 / 2 maps forward, 3 / 2 backward), formula, compiled, tuned, timm, contiguous
    assert " ".join(lines[0][4:]) == "0.91 0.11 1.10 ! - - -"
    assert " ".join(lines[1][4:]) == "1.36 0.11 1.10 ! - - -"
    assert " ".join(lines[2][4:]) == "0.45 ! 0.22 ! 2.20 ! 0.50 0.50 2.00 !"
    assert " ".join(lines[3][4:]) == "0.68 ! 0.22 ! 2.20 ! 0.50 0.50 2.00 !"


def test_gpu_models_goal_table_marks_missed_goals() -> None:
    row = {
        "model": "resnet50",
        "task": "training",
        "batch": 256,
        "ms": {"plain": [9.0, 10.0, 11.0]},
        "ratio": {"formula": [1.1, 1.2, 1.3], "simam": [1.0, 1.02, 1.1]},
        "peak bytes": {"plain": 5e9, "formula": 9e9, "simam": 6e9},
        "activation bytes": 1e9,
    }
    slow = {"ratio": row["ratio"] | {"simam": [1.0, 1.04, 1.1]}, "activation bytes": 9e8}
    inference = {"task": "inference", "batch": 1, "activation bytes": 9e8}
    _, *lines = cells(gpu_models.goal_table([row, row | slow, row | inference]))
    assert " ".join(lines[0]) == "resnet50 training 256 10.00 1.200 1.020 1.03 1000 1000"
    assert " ".join(lines[1]) == "resnet50 training 256 10.00 1.200 1.040 ! 1.03 1000 ! 900"
    assert " ".join(lines[2]) == "resnet50 inference 1 10.00 1.200 1.020 - 1000 900"


@pytest.fixture(scope="module")
def plot_speed() -> ModuleType:
    spec = spec_from_file_location("plot_speed", ROOT / "docs" / "plot_speed.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "speed" / "results" / f"{name}.json"
    return json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("name", ["op", "op-2-threads"])
@pytest.mark.parametrize("kind", op.PASSES)
def test_plot_speed_op_rows_read_the_committed_results(
    name: str, kind: str, plot_speed: ModuleType
) -> None:
    cases = committed(name)
    rows = list(plot_speed.op_rows(cases, kind))
    assert [row[:2] for row in rows] == [[case["shape"], case["layout"]] for case in cases]
    for row, case in zip(rows, cases, strict=True):
        copy, fastest, slowest = row[3], row[-2], row[-1]
        assert copy == f"{case[kind]['simam'] / case[kind]['copy']:.2f}"
        if case["shape"].count("x") == 3:
            assert float(fastest.split()[0]) >= float(slowest.split()[0])
            assert fastest.endswith(")")
        else:
            assert (fastest, slowest) == ("-", "-")


def test_plot_speed_model_rows_read_the_committed_results(plot_speed: ModuleType) -> None:
    cases = committed("models")
    rows = list(plot_speed.model_rows(cases))
    assert [row[0] for row in rows] == [case["model"] for case in cases]
    for row in rows:
        *measured, reference = row[5:]
        assert all(cell.endswith(")") for cell in measured)
        assert (reference == "-") == (row[2] == "eager")


def test_plot_speed_markdown_table_has_a_cell_for_every_head(plot_speed: ModuleType) -> None:
    lines = list(plot_speed.markdown_table(["a", "b"], [["1", "2"], ["3", "4"]]))
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |", ""]


def test_plot_speed_three_digits_rounds(plot_speed: ModuleType) -> None:
    texts = [plot_speed.three_digits(value) for value in (0.12345, 1.2, 58.26, 2744.0)]
    assert texts == ["0.123", "1.2", "58.3", "2740"]
