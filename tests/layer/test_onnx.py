"""One layer as an ONNX graph: its nodes, and its values after a conversion to float16."""

import io
import math
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from simam import SimAM
from simam import functional as F

onnx = pytest.importorskip("onnx", reason="reads the graphs")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graphs")
float16_graph = pytest.importorskip("tests.helpers.float16_graph")
to_float16 = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16

STATISTICS = ("shared", "leave_one_out")

pytestmark = pytest.mark.filterwarnings(
    # torch deprecates its first exporter, which is still widely used.
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
)

both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
both_sizes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@both_statistics
def test_SimAM_onnx_legacy_graph_of_float32_has_no_conversion(statistics: str) -> None:
    nodes = count_nodes(legacy(SimAM(statistics=statistics), normal()))
    assert not {"Cast", "Shape", "Gather", "ReduceSum"} & nodes.keys()
    assert sum(nodes.values()) <= 22 + 6 * (statistics == "leave_one_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_SimAM_onnx_legacy_graph_with_dynamic_axes_reads_the_shape_once(dtype: torch.dtype) -> None:
    model = onnx.shape_inference.infer_shapes(legacy(SimAM(), normal().to(dtype), dynamic=True))
    nodes = count_nodes(model)
    assert nodes["Shape"] == 1
    assert sum(nodes.values()) <= 32 + (dtype == torch.float64)
    types = {value.name: value.type.tensor_type for value in model.graph.value_info}
    converted = [types[node.input[0]] for node in model.graph.node if node.op_type == "Cast"]
    assert all(len(each.shape.dim) == 0 for each in converted)  # sizes alone, and no map
    if dtype == torch.float32:
        integers = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
        assert all(each.elem_type in integers for each in converted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@both_sizes
@both_statistics
def test_SimAM_onnx_legacy_values_at_other_sizes(
    statistics: str, dynamic: bool, dtype: torch.dtype
) -> None:
    layer = SimAM(e_lambda=0.1, statistics=statistics)
    session = start(legacy(layer, normal().to(dtype), dynamic))
    for shape in [(1, 2, 7, 6), (2, 2, 1, 1), (3, 2, 1, 5)] if dynamic else [(2, 2, 4, 5)]:
        x = normal(*shape).to(dtype)
        torch.testing.assert_close(run(session, x), layer(x))


def test_SimAM_onnx_graph_of_the_dynamo_exporter() -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export is written in it")
    layer, x = SimAM().eval(), normal()
    nodes = count_nodes(torch.onnx.export(layer, (x,), dynamo=True, verbose=False).model_proto)
    assert not {"Cast", "Shape", "Gather", "ReduceSum"} & nodes.keys()
    assert sum(nodes.values()) <= 22
    sizes = (dict.fromkeys((0, 2, 3), Dim.DYNAMIC),)
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert count_nodes(program.model_proto)["Cast"] <= 1


# A sum of squares over 56 x 56 positions overflows float16 from a standard deviation of 4.6 on, and
# a square from 256 on. ONNX Runtime computes more widely than float16, so it hides this.
@both_statistics
@both_sizes
@pytest.mark.parametrize("std", [1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0, 100.0, 300.0, 2000.0])
def test_SimAM_onnx_float16_values(std: float, dynamic: bool, statistics: str) -> None:
    x = std * (normal(1, 2, 56, 56) + torch.tensor([0.0, 1.0])[:, None, None])
    model = float16_model(x.shape, dynamic, statistics)
    assert gate_error(run(start(model), x.half()), x, statistics) < 1e-3
    assert gate_error(run_in_float16(model, x.half()), x, statistics) < 1e-3


@both_statistics
@pytest.mark.parametrize(
    "channel",
    [
        torch.zeros(7, 7),
        torch.full((56, 56), 333.3),
        torch.full((1, 1), 7.0),
        torch.tensor([[1.0, 300.0]]),
        300 * torch.eye(56),
        300 * torch.eye(12544)[77].reshape(112, 112),  # one neuron that differs from the others
    ],
    ids=["zeros", "constant", "one position", "two positions", "diagonal", "outlier"],
)
def test_SimAM_onnx_float16_values_of_special_channels(channel: Tensor, statistics: str) -> None:
    x = channel.expand(1, 2, -1, -1)
    model = float16_model((1, 2, 4, 5), dynamic=True, statistics=statistics)
    assert gate_error(run(start(model), x.half()), x, statistics) < 1e-3
    assert gate_error(run_in_float16(model, x.half()), x, statistics) < 1e-3


def test_run_in_float16_shows_that_a_sum_of_squares_overflows() -> None:
    class Formula(nn.Module):
        """The formula as the paper writes it."""

        def forward(self, x: Tensor) -> Tensor:
            square = (x - x.mean([2, 3], keepdim=True)) * (x - x.mean([2, 3], keepdim=True))
            variance = square.sum([2, 3], keepdim=True) / (56 * 56 - 1)
            return x * torch.sigmoid(square / (4 * (variance + 1e-4)) + 0.5)

    x = normal(1, 2, 56, 56)
    model = to_float16(legacy(Formula(), x))
    assert gate_error(run_in_float16(model, x.half()), x) < 1e-3
    assert gate_error(run_in_float16(model, (10 * x).half()), 10 * x) > 0.3
    assert gate_error(run_in_float16(model, (300 * x).half()), 300 * x) == math.inf


def gate_error(output: Tensor, x: Tensor, statistics: str = "shared") -> float:
    """Return the largest error of the gate, beyond the rounding of the output; NaN is infinite."""
    x = x.half().double()
    expected = F.simam(x, statistics=statistics)
    rounding = expected.abs() * 2**-11 + 2**-25
    error = ((output.double() - expected).abs() - rounding) / x.abs().clamp_min(2**-24)
    return float(error.nan_to_num(math.inf).max())


@cache
def float16_model(shape: tuple[int, ...], dynamic: bool, statistics: str) -> Any:
    return to_float16(legacy(SimAM(statistics=statistics), normal(*shape), dynamic))


def legacy(module: nn.Module, x: Tensor, dynamic: bool = False) -> Any:
    """Export with torch's first exporter, which traces."""
    file = io.BytesIO()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}} if dynamic else None
    torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


def start(model: Any) -> Any:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def run(session: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def run_in_float16(model: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(float16_graph.run(model, x.numpy()))


def count_nodes(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.op_type != "Constant")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 2, 4, 5), generator=torch.Generator().manual_seed(0))
