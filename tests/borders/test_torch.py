"""Torch's own folding, quantisation and conversion, on ResNet-18."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simam import attach, attached, detach
from tests.helpers.borders import compare, needs, relative_difference, tool, train_norms

pytestmark = needs("torchvision")

HOSTS = 8


@pytest.fixture
def net() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    net = train_norms(torchvision.models.resnet18(), torch.rand(4, 3, 64, 64))
    return attach(net.requires_grad_(False), e_lambda=0.1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 64, 64)


@pytest.fixture
def save(net: nn.Module, x: Tensor, record: Callable[..., None]) -> Callable[..., None]:
    """Compare what a tool made, or left, with the network as it was; record it."""
    plain, expected = detach(copy.deepcopy(net))(x), net(x)

    def save(case: str, outcome: str, output: Tensor, **details: object) -> None:
        differences = compare(output, expected, plain)
        record(tool("torch"), case, outcome, network="resnet18", **differences, **details)

    return save


def test_fuse_conv_bn_eval_is_refused(net: nn.Module, x: Tensor, save: Callable[..., None]) -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    block = net.layer1[0]
    with pytest.raises(RuntimeError, match=r"^cannot fold .* This module has not been changed\."):
        fuse_conv_bn_eval(block.conv2, block.bn2)
    save("`fuse_conv_bn_eval`", "refused clearly", net(x))


def test_fx_fuse_passes_over_hosts(net: nn.Module, x: Tensor, save: Callable[..., None]) -> None:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(net)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == HOSTS
    save("`torch.fx.experimental.optimization.fuse`", "works", fused(x))


def test_fuse_modules_is_refused(net: nn.Module, x: Tensor, save: Callable[..., None]) -> None:
    from torch.ao.quantization import fuse_modules

    with pytest.raises(AssertionError, match=r"^did not find fuser method for: .*SimAMConv2d"):
        fuse_modules(net, [["layer1.0.conv2", "layer1.0.bn2"]], inplace=True)
    save("`torch.ao.quantization.fuse_modules`", "refused clearly", net(x))


def test_static_quantisation_with_fx_keeps_simam(
    net: nn.Module, x: Tensor, record: Callable[..., None]
) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def quantised(model: nn.Module) -> nn.Module:
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return convert_fx(prepared)

    converted = quantised(net)
    plain = detach(copy.deepcopy(net))
    expected = net(x)
    difference = relative_difference(converted(x), expected)
    without = relative_difference(quantised(plain)(x), expected)
    assert difference < 0.15  # 8 bits
    assert without > 2 * difference
    record(
        tool("torch"),
        "static quantisation with fx",
        "works",
        network="resnet18",
        difference=difference,
        without=without,
    )


def test_eager_static_quantisation_fails_at_the_first_host(
    x: Tensor, record: Callable[..., None]
) -> None:
    import torchvision
    from torch.ao.quantization import convert, get_default_qconfig, prepare

    torch.manual_seed(0)
    net = torchvision.models.quantization.resnet18(quantize=False)
    attach(train_norms(net, x), e_lambda=0.1)
    expected = net(x)
    net.qconfig = get_default_qconfig("x86")
    prepared = prepare(net)
    prepared(x)
    converted = convert(prepared)
    with pytest.raises(NotImplementedError, match="QuantizedCPU"):
        converted(x)
    assert torch.equal(net(x), expected)
    record(
        tool("torch"),
        "eager static quantisation",
        "fails",
        network="resnet18",
        note="the converted copy raises NotImplementedError at the first host",
    )


def test_dynamic_quantisation_of_the_linear_layer_works(
    net: nn.Module, x: Tensor, record: Callable[..., None]
) -> None:
    from torch.ao.quantization import quantize_dynamic

    converted = quantize_dynamic(net, {nn.Linear})
    assert len(attached(converted)) == HOSTS
    expected = net(x)
    difference = relative_difference(converted(x), expected)
    without = relative_difference(quantize_dynamic(detach(net), {nn.Linear})(x), expected)
    assert difference < 0.05  # 8 bits
    assert without > 2 * difference
    record(
        tool("torch"),
        "dynamic quantisation of the last layer",
        "works",
        network="resnet18",
        difference=difference,
        without=without,
    )


def test_to_mkldnn_fails_at_the_first_host(
    net: nn.Module, x: Tensor, record: Callable[..., None]
) -> None:
    from torch.utils.mkldnn import to_mkldnn

    with pytest.raises(RuntimeError, match=r"tried to replace existing module 'simam': SimAM\("):
        to_mkldnn(net)
    record(
        tool("torch"),
        "`torch.utils.mkldnn.to_mkldnn`",
        "fails",
        network="resnet18",
        note="the layers before the first host are converted already; use a copy",
    )


def test_inductor_freezing_gives_the_eager_values(
    net: nn.Module, x: Tensor, save: Callable[..., None]
) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    with torch.no_grad(), config.patch(freezing=True):
        save("`torch.compile` with freezing", "works", torch.compile(net)(x))
