"""Passes that fold a batch norm into the convolution before it, where SimAM stands between.

Each must refuse, or leave the pair alone; none may fold it and go on.
"""

import copy
import io
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
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from simam import SimAM, attach, attached, detach, detached
from tests.helpers.tiny_blocks import Block, block, conv, snapshot

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


# What follows imitates the folding of other packages, each by its own steps.


def into_a_new_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=True,
    )
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = 0 if conv.bias is None else conv.bias
    folded.weight.data = conv.weight * scale[:, None, None, None]
    folded.bias.data = (bias - norm.running_mean) * scale + norm.bias
    return folded


def into_data_and_a_registered_bias(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight.data = conv.weight * scale[:, None, None, None]
    bias = 0 if conv.bias is None else conv.bias
    bias = (bias - norm.running_mean) * scale + norm.bias
    if conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(bias))
    else:
        conv.bias.data = bias
    return conv.requires_grad_(False)


def into_an_assigned_weight_then_bias(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    weight = conv.weight
    bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    conv.weight = nn.Parameter(weight * scale.reshape(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
    return conv


def into_both_at_once(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, *statistics, norm.weight, norm.bias
    )
    return conv.requires_grad_(False)


Fold = Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Conv2d]
every_fold = pytest.mark.parametrize(
    "fold",
    [
        into_a_new_convolution,
        into_data_and_a_registered_bias,
        into_an_assigned_weight_then_bias,
        into_both_at_once,
    ],
)


@every_fold
@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
@torch.no_grad()
def test_attached_convolution_refuses_every_fold(
    net: nn.Module, x: Tensor, fold: Fold, copied: bool
) -> None:
    net = copy.deepcopy(net) if copied else net
    before, expected = snapshot(net), net(x)
    with pytest.raises(RuntimeError, match=r"^cannot fold .* This module has not been changed\."):
        fold(net[0].conv2, net[0].norm2)
    assert snapshot(net) == before
    assert torch.equal(net(x), expected)


@every_fold
@torch.no_grad()
def test_imitated_fold_is_right_on_the_plain_network(net: nn.Module, x: Tensor, fold: Fold) -> None:
    with_simam = net(x)
    expected = detach(net)(x)
    assert not torch.allclose(with_simam, expected, rtol=0.01, atol=0.01)
    net[0].conv2, net[0].norm2 = fold(net[0].conv2, net[0].norm2), nn.Identity()
    torch.testing.assert_close(net(x), expected)


class Unit(nn.Module):
    """A convolution with its norm and activation, as in Ultralytics and its family."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = conv(bias=bias)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class TwoKernels(nn.Module):
    """Two convolutions that are folded into one; a second folding fails for want of `small`."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.large, self.small = Unit(bias), Unit(bias)
        self.large.act = self.small.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.large(x)

    def fuse(self) -> None:
        large = into_a_new_convolution(self.large.conv, self.large.bn)
        small = into_a_new_convolution(self.small.conv, self.small.bn)
        large.weight.data += small.weight
        large.bias.data += small.bias
        self.large = large
        del self.small


class Bottleneck(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


@pytest.fixture
def family(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    residual = Bottleneck(conv1=Unit(bias), conv2=Unit(bias))
    net = nn.Sequential(Unit(bias), residual, TwoKernels(bias))
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        for tensor in norm.parameters():
            nn.init.uniform_(tensor, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return attach(net.eval(), e_lambda=0.1)


def is_unit(module: nn.Module) -> bool:
    return isinstance(module, Unit)


def is_exactly_unit(module: nn.Module) -> bool:
    return type(module) is Unit


@torch.no_grad()
def fuse_family(
    net: nn.Module,
    fold: Fold = into_data_and_a_registered_bias,
    is_wanted: Callable[[nn.Module], bool] = is_unit,
) -> nn.Module:
    if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        return net
    for m in net.modules():
        if isinstance(m, TwoKernels):
            m.fuse()
            m.forward = m.forward_fuse
        if is_wanted(m) and hasattr(m, "bn"):
            m.conv = fold(m.conv, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
    return net


def assert_unfused_values(net: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


@every_fold
@pytest.mark.parametrize("is_wanted", [is_unit, is_exactly_unit])
@torch.no_grad()
def test_family_folding_passes_over_attached_convolutions(
    family: nn.Module, x: Tensor, fold: Fold, is_wanted: Callable[[nn.Module], bool]
) -> None:
    expected, plain = family(x), detach(copy.deepcopy(family))(x)
    assert not torch.allclose(plain, expected, rtol=0.01, atol=0.01)
    for _ in range(2):
        fuse_family(family, fold, is_wanted)
        assert attached(family).keys() == {"1.conv2.conv"}
        assert [path for path, m in family.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
            "1.conv2.bn"
        ]
        assert_unfused_values(family, x, expected)


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("change", [copy.deepcopy, saved_and_loaded, nn.Module.double])
def test_family_folding_of_a_copy_gives_the_unfused_values(
    family: nn.Module, x: Tensor, change: Callable[[nn.Module], nn.Module]
) -> None:
    expected = family(x)
    changed = change(family)
    x = x.to(changed[0].conv.weight.dtype)
    for net in (fuse_family(changed), change(changed)):
        assert attached(net).keys() == {"1.conv2.conv"}
        assert_unfused_values(net, x, expected.to(x.dtype))


def exported(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (torch.randn(2, 8, 6, 6),)).module()


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, torch.randn(2, 8, 6, 6))


def compiled(net: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", fullgraph=True)


@pytest.mark.parametrize("deploy", [exported, traced, compiled])
def test_family_folding_before_deployment_gives_the_unfused_values(
    family: nn.Module, x: Tensor, deploy: Callable[[nn.Module], nn.Module]
) -> None:
    expected = family(x)
    assert_unfused_values(deploy(copy.deepcopy(family)), x, expected)
    assert_unfused_values(deploy(fuse_family(family)), x, expected)


def test_family_folding_works_in_half_precision(family: nn.Module, x: Tensor) -> None:
    expected = family(x)
    with torch.no_grad():
        result = fuse_family(family.half())(x.half())
    # Products of three layers in half precision, which has 11 bits.
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


def test_detach_restores_the_classes_of_a_folded_family(family: nn.Module, x: Tensor) -> None:
    expected = detach(copy.deepcopy(family))(x)
    detach(fuse_family(family))
    kinds = {type(module) for module in family.modules()}
    assert {Unit, TwoKernels, nn.Conv2d} <= kinds
    assert not any(kind.__module__.startswith("simam") or "SimAM" in str(kind) for kind in kinds)
    assert_unfused_values(family, x, expected)


@every_fold
@torch.no_grad()
def test_detached_does_not_attach_to_what_was_folded_meanwhile(
    family: nn.Module, x: Tensor, fold: Fold
) -> None:
    expected = detach(copy.deepcopy(family))(x)
    message = (
        r"^left without SimAM: 1\.conv2\.conv\. The block replaced or removed a module beside it"
    )
    with pytest.raises(ValueError, match=message), detached(family):
        fuse_family(family, fold)
    assert attached(family) == {}
    assert_unfused_values(family, x, expected)


@torch.no_grad()
def test_detached_returns_the_layers_of_what_was_not_folded(net: nn.Module, x: Tensor) -> None:
    net.append(attach(copy.deepcopy(net[0])))
    with pytest.raises(ValueError, match=r"^left without SimAM: 1\.conv2\."), detached(net):
        net[1].norm2 = nn.Identity()
    assert attached(net).keys() == {"0.conv2"}
