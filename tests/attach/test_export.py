"""Attached networks through torch.export and ONNX, at batches and sizes they have not seen."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from simam import attach
from tests.helpers.by_hand import PLACES, example, networks, plain

# They compute a padding for every size, at which torch.export works for minutes.
SIZE_IS_FIXED = {name for name in PLACES if name.startswith("timm/tf_")}
# timm takes the batch for the groups of a convolution, which ONNX must know.
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
            # Exported, the layer is plain torch operations.
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
