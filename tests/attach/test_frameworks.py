"""The snippets of docs/frameworks.md for packages that are not in the Python package index."""

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simam
from tests.helpers.by_hand import ByHand
from tests.helpers.docs import python_blocks, run_section

# Every heading of the page with Python blocks, and the file whose tests run them.
TESTS = {
    "Plugins of mmcv": "tests/borders/test_mmdet.py",
    "MMDetection": "tests/borders/test_mmdet.py",
    "detectron2": "tests/attach/test_frameworks.py",
    "segmentation-models-pytorch": "tests/borders/test_segmentation_models.py",
    "MONAI": "tests/borders/test_monai.py",
    "transformers": "tests/borders/test_transformers.py",
    "diffusers": "tests/borders/test_diffusers.py",
}


class Conv2d(nn.Conv2d):
    """A convolution that runs its norm, and looks at the size of its input."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        padding = kernel // 2
        super().__init__(channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and self.training and isinstance(self.norm, nn.SyncBatchNorm):
            raise ValueError("the norm takes no empty map")
        return self.norm(self._conv_forward(x, self.weight, self.bias))


class BottleneckBlock(nn.Module):
    """A bottleneck whose activations are functions that overwrite their input."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut = Conv2d(channels, out_channels, 1, stride) if stride > 1 else None
        self.conv1 = Conv2d(channels, 4, 1, stride)
        self.conv2 = Conv2d(4, 4, 3)
        self.conv3 = Conv2d(4, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ResNet(nn.Module):
    """Returns a dict of maps. It keeps its stages in a list, too, and runs these."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = Conv2d(channels, 8, 3)
        self.res2 = nn.Sequential(BottleneckBlock(8, 8, 1), BottleneckBlock(8, 8, 1))
        self.res3 = nn.Sequential(BottleneckBlock(8, 16, 2))
        self.stages_and_names = [(self.res2, "res2"), (self.res3, "res3")]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs, x = {}, F.relu_(self.stem(x))
        for stage, name in self.stages_and_names:
            x = outputs[name] = stage(x)
        return outputs


@pytest.fixture
def detectron2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., nn.Module]]:
    """An imitation of detectron2's registry, from its documentation; returns what is registered."""
    registered: dict[str, Callable[..., nn.Module]] = {}

    class Registry:
        def register(self) -> Callable[[Any], Any]:
            return lambda build: registered.setdefault(build.__name__, build)

    modeling = types.ModuleType("detectron2.modeling")
    modeling.BACKBONE_REGISTRY = Registry()
    modeling.build_resnet_backbone = lambda cfg, input_shape: ResNet(input_shape.channels)
    monkeypatch.setitem(sys.modules, "detectron2", types.ModuleType("detectron2"))
    monkeypatch.setitem(sys.modules, "detectron2.modeling", modeling)
    return registered


def test_attach_in_a_backbone_of_detectron2_equals_the_formula_by_hand(
    detectron2: dict[str, Callable[..., nn.Module]],
) -> None:
    torch.manual_seed(0)
    backbone = types.SimpleNamespace(NAME="build_resnet_backbone")
    cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(BACKBONE=backbone))
    run_section("frameworks.md", "detectron2", cfg=cfg)
    build = detectron2[cfg.MODEL.BACKBONE.NAME]
    net = build(cfg, types.SimpleNamespace(channels=3)).double()
    hosts = ["res2.0.conv3", "res2.1.conv3", "res3.0.conv3"]
    assert list(simam.attached(net)) == hosts
    plain = ResNet(3).double()
    plain.load_state_dict(net.state_dict())
    by_hand, formula = copy.deepcopy(plain), ByHand(nn.Identity(), 0.1)
    for host in hosts:
        by_hand.get_submodule(host).register_forward_hook(lambda _, __, output: formula(output))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    cotangent = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    outputs, gradients = [], []
    for each in (net, by_hand, plain):
        outputs.append(each(x)["res3"])
        gradients.append(torch.autograd.grad(outputs[-1], list(each.parameters()), cotangent))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(outputs[1], outputs[2], rtol=0.05)
    assert not torch.allclose(gradients[1][0], gradients[2][0], rtol=0.05)


def test_attach_refuses_the_authors_place_in_a_backbone_of_detectron2() -> None:
    with pytest.raises(ValueError, match=r"the forward of conv2 \(Conv2d\) goes on to BatchNorm2d"):
        simam.attach(ResNet(3))


def test_every_block_of_the_page_is_run_by_a_test(pytestconfig: pytest.Config) -> None:
    assert python_blocks("frameworks.md").keys() == TESTS.keys()
    for heading, file in TESTS.items():
        text = (pytestconfig.rootpath / file).read_text()
        assert f'run_section("frameworks.md", "{heading}"' in text, heading
