"""Attached networks through torch.export and ONNX, at other batch and image sizes."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from simam import attach
from tests.helpers.by_hand import HOSTS, example, networks, plain
from tests.helpers.tiny_blocks import basic

# These compute their padding from the size, on which torch.export spends minutes.
SIZE_IS_FIXED = {name for name in HOSTS if name.startswith("timm/tf_")}
# timm makes the batch the groups of a convolution, and ONNX needs that number.
BATCH_IS_FIXED = {"timm/tf_efficientnet_cc_b0_4e"}


def attached(name: str) -> nn.Module:
    return attach(plain(name).eval(), e_lambda=0.1)


def dynamic(x: Tensor, name: str) -> dict[int, object]:
    dims = [0] if name in SIZE_IS_FIXED else [0, x.dim() - 2, x.dim() - 1]
    return dict.fromkeys(dims, Dim.DYNAMIC)


def unseen(x: Tensor, name: str) -> Tensor:
    size = x.shape[2:] if name in SIZE_IS_FIXED else (*x.shape[2:-2], 64, 96)
    return torch.randn((3, 3, *size), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", networks())
def test_export_matches_eager_at_other_sizes(name: str) -> None:
    model, x = attached(name), example(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=(dynamic(x, name),)).module()
    with torch.no_grad():
        for images in (x, unseen(x, name)):
            # An exported layer is plain torch operations.
            expected = model(images)
            scale = float(expected.abs().max())
            torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", networks())
def test_onnx_matches_eager_at_other_sizes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export is written in it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported network")
    model, x = attached(name), example(name)
    batch_is_fixed = name in BATCH_IS_FIXED
    shapes = None if batch_is_fixed else (dynamic(x, name),)
    path = tmp_path / "network.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (x,) if batch_is_fixed else (x, unseen(x, name)):
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            expected = model(images)
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
)
def test_onnx_of_the_legacy_exporter_matches_eager_at_other_sizes() -> None:
    onnx = pytest.importorskip("onnx", reason="reads the exported network")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported network")
    model = attach(nn.Sequential(basic(), basic()).eval(), e_lambda=0.1)
    sizes = {"images": {0: "batch", 2: "height", 3: "width"}}
    for axes, shapes in ((None, [(2, 8, 9, 7)]), (sizes, [(1, 8, 12, 5), (3, 8, 1, 1)])):
        file = io.BytesIO()
        torch.onnx.export(
            model,
            (torch.randn(2, 8, 9, 7),),
            file,
            dynamo=False,
            input_names=["images"],
            dynamic_axes=axes,
        )
        nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
        # One for each of the two layers.
        assert nodes.count("Shape") == (2 if axes else 0)
        assert axes or "Cast" not in nodes

        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(file.getvalue(), providers=providers)
        for shape in shapes:
            images = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            (output,) = session.run(None, {"images": images.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(output), model(images))
