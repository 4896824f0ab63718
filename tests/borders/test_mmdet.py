"""MMDetection 3: SimAM in a ResNet, attached by a registered backbone or as a plugin of mmcv.

mmdetection imports the compiled operators of mmcv, which these networks do not run. Where they are
missing, as in mmcv-lite, a module without content stands for them.
"""

import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simam import SimAM, attached
from tests.helpers.borders import compare_by_hand, needs, tool, train_norms
from tests.helpers.by_hand import RESNET_50, RESNET_50_BLOCKS, ByHand, in_each
from tests.helpers.docs import python_blocks, run_section

pytestmark = needs("mmdet", "mmcv", "mmengine")


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mmdetection's registries, which forget what a test has registered."""
    if find_spec("mmcv._ext") is None:
        extension: Any = types.ModuleType("mmcv._ext")
        extension.__getattr__ = lambda name: None
        monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    import mmdet.models
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    registered = [MODELS._module_dict, mmdet.registry.MODELS._module_dict]
    before = [dict(names) for names in registered]
    yield
    for names, old in zip(registered, before, strict=True):
        names.clear()
        names.update(old)


def detector(text: str = "") -> nn.Module:
    """mmdetection's own RetinaNet with a ResNet-50, and a file of configuration that changes it."""
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    base = Path(mmdet.__file__).parent / ".mim/configs/_base_/models/retinanet_r50_fpn.py"
    file = Path("retinanet.py")
    file.write_text(f"_base_ = [{str(base)!r}]\n{text}")
    config = Config.fromfile(file)
    config.model.backbone.init_cfg = None  # no download
    return MODELS.build(config.model)


def backbone(config: dict[str, Any]) -> nn.Module:
    from mmdet.registry import MODELS

    return MODELS.build({"frozen_stages": -1, "norm_eval": False, **config})


def run_detector(net: nn.Module, x: Tensor) -> Tensor:
    """The class scores of the five levels."""
    return torch.cat([scores.flatten() for scores in net(x, mode="tensor")[0]])


def run_backbone(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)[-1]


def test_registered_backbone_equals_the_formula_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module, config = python_blocks("frameworks.md")["MMDetection"]
    Path("simam_backbone.py").write_text(module)
    net = train_norms(detector(config), torch.rand(2, 3, 64, 64))
    hosts = [f"backbone.{host}" for host in RESNET_50]
    assert list(attached(net)) == hosts
    x = torch.rand(1, 3, 64, 64)
    differences = compare_by_hand(net, detector(), hosts, run_detector, x)
    case = "a registered backbone that attaches"
    record(tool("mmdet"), case, "works", network="RetinaNet with ResNet-50", **differences)


def test_plugin_of_mmcv_equals_the_formula_by_hand(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    config = run_section("frameworks.md", "Plugins of mmcv")["backbone"]
    net = backbone(config)
    train_norms(net, torch.rand(2, 3, 64, 64))
    assert sum(isinstance(module, SimAM) for module in net.modules()) == 16
    assert net.layer1[0].after_conv3_plugin_names == ["simam"]
    plain = backbone({k: v for k, v in config.items() if k != "plugins"})
    hosts = in_each(RESNET_50_BLOCKS, "bn3")
    differences = compare_by_hand(net, plain, hosts, run_backbone, torch.rand(1, 3, 64, 64))
    case = "SimAM as a plugin of mmcv, after_conv3"
    record(tool("mmdet"), case, "works", network="ResNet-50", **differences)


@torch.no_grad()
def test_plugin_after_conv2_is_behind_norm_and_activation() -> None:
    torch.manual_seed(0)
    config = run_section("frameworks.md", "Plugins of mmcv")["backbone"]
    config["plugins"][0]["position"] = "after_conv2"
    net, plain = backbone(config), backbone({"type": "ResNet", "depth": 50})
    plain.load_state_dict(net.state_dict())
    inputs = []
    for each in (net, plain):
        each.eval()
        each.layer1[0].conv3.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        each(torch.ones(1, 3, 64, 64).triu())
    actual, activation = inputs
    assert activation.min() == 0
    torch.testing.assert_close(actual, ByHand(nn.Identity(), 0.1)(activation))
    assert not torch.allclose(actual, activation, rtol=0.05)


def test_plugins_are_refused_by_BasicBlock() -> None:
    config = run_section("frameworks.md", "Plugins of mmcv")["backbone"]
    with pytest.raises(AssertionError, match="Not implemented"):
        backbone(config | {"depth": 18})


def test_fuse_conv_bn_is_refused(record: Callable[..., None]) -> None:
    from mmcv.cnn import fuse_conv_bn

    names = run_section("frameworks.md", "MMDetection")
    net = backbone({"type": "SimAMResNet", "depth": 18, **names["model"]["backbone"]})
    net.eval()
    with pytest.raises(RuntimeError, match=r"^cannot fold "):
        fuse_conv_bn(net)
    assert len(attached(net)) == 8
    record(tool("mmdet"), "mmcv's `fuse_conv_bn`", "refused clearly", network="ResNet-18")
