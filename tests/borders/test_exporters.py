"""ONNX, ExecuTorch, OpenVINO and Core ML: converters of a traced or an exported network."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simam import attach, detach
from tests.helpers.borders import compare, needs, relative_difference, tool, train_norms

pytestmark = needs("torchvision")

Record = Callable[..., None]
NETWORK = "resnet18"
PROVIDERS = ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(images: Tensor) -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return attach(train_norms(resnet18(), images), e_lambda=0.1)


def legacy_onnx(network: nn.Module, images: Tensor, dynamic: bool) -> bytes:
    file = io.BytesIO()
    axes = {"images": {0: "batch", 2: "height", 3: "width"}} if dynamic else None
    options = {"dynamo": False, "input_names": ["images"], "dynamic_axes": axes}
    torch.onnx.export(network, (images,), file, **options)
    return file.getvalue()


@torch.no_grad()
def plain_output(network: nn.Module, images: Tensor) -> Tensor:
    return detach(copy.deepcopy(network))(images)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_onnxconverter_common_float16(
    network: nn.Module, images: Tensor, dynamic: bool, record: Record
) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    float16 = pytest.importorskip("onnxconverter_common.float16")
    model = onnx.load_from_string(legacy_onnx(network, images, dynamic))
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, "Cast"] if dynamic else None
    half = float16.convert_float_to_float16(model, op_block_list=blocked)
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=PROVIDERS)
    (output,) = session.run(None, {"images": images.half().numpy()})
    expected = network(images)
    difference = relative_difference(torch.from_numpy(output), expected)
    without = relative_difference(plain_output(network, images), expected)
    assert difference < 1e-2 < without
    record(
        tool("onnxconverter-common"),
        f"to float16, {'dynamic' if dynamic else 'static'} sizes",
        "works, with a note" if dynamic else "works",
        network=NETWORK,
        difference=difference,
        without=without,
        **({"note": "add `Cast` to `op_block_list`"} if dynamic else {}),
    )


@torch.no_grad()
def test_executorch_delegates_the_whole_network(
    network: nn.Module, images: Tensor, record: Record
) -> None:
    partitioner = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    lowered = to_edge_transform_and_lower(
        torch.export.export(network, (images,)), partitioner=[partitioner.XnnpackPartitioner()]
    )
    nodes = lowered.exported_program().graph.nodes
    calls = [str(n.target) for n in nodes if n.op == "call_function"]
    assert [name for name in calls if "getitem" not in name] == ["executorch_call_delegate"]
    buffer = lowered.to_executorch().buffer  # which must outlive the program
    (output,) = _load_for_executorch_from_buffer(buffer).forward((images,))
    differences = compare(output, network(images), plain_output(network, images))
    record(tool("executorch"), "XNNPACK, one delegate", "works", network=NETWORK, **differences)


@pytest.mark.parametrize("source", ["traced", "exported", "onnx"])
@torch.no_grad()
def test_openvino_converts(
    network: nn.Module, images: Tensor, source: str, record: Record, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "network.onnx"
    if source == "onnx":
        path.write_bytes(legacy_onnx(network, images, dynamic=True))
        converted = openvino.convert_model(path)
    elif source == "traced":
        traced = torch.jit.trace(network, images)
        converted = openvino.convert_model(traced, example_input=images)
    else:
        converted = openvino.convert_model(torch.export.export(network, (images,)))
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    output = openvino.Core().compile_model(converted, "CPU", hint)(images.numpy())[0]
    differences = compare(torch.from_numpy(output), network(images), plain_output(network, images))
    record(tool("openvino"), f"convert, {source}", "works", network=NETWORK, **differences)


# Core ML's own engine runs on a Mac alone.
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_coremltools_converts_a_traced_network(
    network: nn.Module, images: Tensor, dynamic: bool, record: Record
) -> None:
    coremltools: Any = pytest.importorskip("coremltools")
    side = coremltools.RangeDim(32, 128) if dynamic else 64
    inputs = [coremltools.TensorType(shape=(2, 3, side, side))]
    model = coremltools.convert(
        torch.jit.trace(network, images), convert_to="mlprogram", inputs=inputs
    )
    operations = [o.op_type for o in model._mil_program.functions["main"].operations]
    assert operations.count("sigmoid") == 8
    # Those of the network's input and output, and without a fixed size those of the sizes.
    assert operations.count("cast") == (18 if dynamic else 2)
    sizes = "dynamic" if dynamic else "static"
    record(tool("coremltools"), f"convert, {sizes} sizes, not run", "works", network=NETWORK)
