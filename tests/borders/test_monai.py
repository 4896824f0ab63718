"""MONAI: SimAM in networks for volumes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simam import attach, attached, plan
from tests.helpers.borders import compare, compare_by_hand, needs, tool, train_norms
from tests.helpers.docs import run_section

pytestmark = needs("monai")

SEGRESNET = [
    "down_layers.0.1.conv2.conv",
    "down_layers.1.1.conv2.conv",
    "down_layers.1.2.conv2.conv",
    "down_layers.2.1.conv2.conv",
    "down_layers.2.2.conv2.conv",
    "down_layers.3.1.conv2.conv",
    "down_layers.3.2.conv2.conv",
    "down_layers.3.3.conv2.conv",
    "down_layers.3.4.conv2.conv",
    "up_layers.0.0.conv2.conv",
    "up_layers.1.0.conv2.conv",
    "up_layers.2.0.conv2.conv",
]
UNET = [
    "model.0.conv.unit1.conv",
    "model.1.submodule.0.conv.unit1.conv",
    "model.1.submodule.1.submodule.conv.unit1.conv",
    "model.1.submodule.2.1.conv.unit0.conv",
]
RESNET = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in (0, 1)]


def run(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2)


def unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2)


def resnet() -> nn.Module:
    from monai.networks.nets import resnet18

    return resnet18(spatial_dims=3, n_input_channels=1, num_classes=4, widen_factor=0.25)


def test_attach_to_SegResNet_equals_the_formula_by_hand(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    net = run_section("frameworks.md", "MONAI")["model"].eval()
    assert list(attached(net)) == SEGRESNET
    x = torch.randn(1, 1, 16, 16, 16)
    differences = compare_by_hand(net, segresnet(), SEGRESNET, run, x)
    record(tool("monai"), "`attach`", "works", network="SegResNet", **differences)


def test_attach_to_UNet_equals_the_formula_by_hand(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    net = attach(unet().eval(), e_lambda=0.1)
    assert list(attached(net)) == UNET
    differences = compare_by_hand(net, unet(), UNET, run, torch.randn(1, 1, 16, 16, 16))
    record(tool("monai"), "`attach`", "works", network="UNet", **differences)


def test_attach_to_resnet18_equals_the_formula_by_hand(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    net = attach(train_norms(resnet(), torch.randn(2, 1, 32, 32, 32)), e_lambda=0.1)
    assert list(attached(net)) == RESNET
    differences = compare_by_hand(net, resnet(), RESNET, run, torch.randn(1, 1, 32, 32, 32))
    record(tool("monai"), "`attach`", "works", network="resnet18", **differences)


def test_plan_refuses_a_network_without_residual_blocks() -> None:
    from monai.networks.nets import BasicUNet, UNet

    for net in (BasicUNet(3, 1, 2), UNet(3, 1, 2, channels=(4, 8), strides=(2,))):
        with pytest.raises(ValueError, match=r"^found no place for SimAM"):
            plan(net)


@torch.no_grad()
def test_bundle_attaches_in_its_configuration(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    parser = run_section("frameworks.md", "MONAI")["parser"]
    net = parser.get_parsed_content("network").eval()
    assert list(attached(net)) == SEGRESNET
    plain = segresnet().eval()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 16, 16, 16)
    without = plain(x)
    differences = compare(net(x), attach(plain, e_lambda=0.1)(x), without)
    case = "`attach` in a bundle's configuration"
    record(tool("monai"), case, "works", network="SegResNet", **differences)
