"""Passes that fold a batch norm into the convolution before it, where SimAM stands between.

Each must refuse, or leave the pair alone; none may fold it and go on.
"""

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

from simam import SimAM, attach, detach
from tests.helpers.tiny_blocks import block, conv

# torch is moving quantisation to another package and warns about it.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:torch\.ao\.quantization is deprecated:DeprecationWarning",
)

FOLDING = "cannot fold or convert this Conv2d: its output passes through SimAM"
NEW_BIAS = "cannot give this convolution a bias, as folding a batch norm into it does"


@block
def normed(self, x):
    return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def bias(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def net(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    parts = {name: conv(bias=bias) for name in ("conv1", "conv2")}
    net = nn.Sequential(normed(**parts, norm1=nn.BatchNorm2d(8), norm2=nn.BatchNorm2d(8)))
    for tensor in (*net[0].norm1.parameters(), *net[0].norm2.parameters()):
        nn.init.uniform_(tensor, 0.5, 2)
    net(torch.randn(8, 8, 6, 6))
    return attach(net.eval(), e_lambda=0.1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def traced_and_optimised(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.optimize_for_inference(torch.jit.trace(net, torch.randn(2, 8, 6, 6)))


def first_pair_fused(net: nn.Module) -> nn.Module:
    return fuse_modules(net, [["0.conv1", "0.norm1"]])


@pytest.mark.parametrize("fold", [fuse, fuse_fx, traced_and_optimised, first_pair_fused])
def test_fusion_passes_leave_the_pair_alone(
    net: nn.Module, x: Tensor, fold: Callable[[nn.Module], nn.Module]
) -> None:
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(fold(net)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor compiles C++ on the CPU")
def test_inductor_freezing_matches_eager(net: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(net)(x), net(x), rtol=1e-4, atol=1e-5)


def test_fuse_modules_refuses_the_class(net: nn.Module) -> None:
    message = "did not find fuser method for: (<class 'torch.nn.modules.conv.SimAMConv2d'>, "
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}"):
        fuse_modules(net, [["0.conv2", "0.norm2"]])


@pytest.mark.parametrize("bias", [False], indirect=True)
def test_attached_convolution_refuses_a_new_bias(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = net(x)
    with pytest.raises(RuntimeError, match=f"^{NEW_BIAS}"):
        net[0].conv2.bias = nn.Parameter(torch.zeros(8))
    net[0].conv2.bias = None
    with torch.no_grad():
        assert torch.equal(net(x), expected)


def test_fuse_conv_bn_refuses_an_attached_convolution(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = net(x)
        with pytest.raises(RuntimeError, match=f"^{FOLDING}"):
            fuse_conv_bn_eval(net[0].conv2, net[0].norm2)
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("bias", [True], indirect=True)
def test_attached_convolution_accepts_a_bias_for_a_bias(net: nn.Module) -> None:
    net[0].conv2.bias = nn.Parameter(torch.zeros(8))
    net.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(net[0].conv2.bias, torch.zeros(8))


def test_attach_accepts_a_folded_convolution(net: nn.Module, x: Tensor) -> None:
    detach(net)
    with torch.no_grad():
        expected = net(x)
        net[0].conv2 = fuse_conv_bn_eval(net[0].conv2, net[0].norm2)
        net[0].norm2 = nn.Identity()
        torch.testing.assert_close(net(x), expected)
    attach(net)
    assert isinstance(net[0].conv2.simam, SimAM)


# torch warns about its own default configuration and its own quantised tensors.
@pytest.mark.filterwarnings(
    "ignore:Please use quant_min and quant_max:UserWarning",
    r"ignore:torch\.quantize_per_tensor:UserWarning",
)
def test_static_quantisation_keeps_simam(net: nn.Module, x: Tensor) -> None:
    prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert [type(m) for m in quantised.modules()].count(SimAM) == 1
    with torch.no_grad():
        # 8 bits over a range of about 10
        torch.testing.assert_close(quantised(x), net(x), rtol=0, atol=0.5)
