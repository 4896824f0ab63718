"""plan on convolutions whose own forward goes on to a norm: no reason says "before" there."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simam import attach, detach, plan
from tests.helpers.tiny_blocks import basic, block, conv, host_paths


class NormedConv2d(nn.Conv2d):
    """A convolution with an optional norm and activation, as detection libraries have it."""

    def __init__(self, norm: object = None, activation: object = None) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and self.training:
            raise ValueError("empty")
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class FrozenNorm(nn.Module):
    """A norm of plain arithmetic, which only its class gives away."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + 0.1


class PaddedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        ih, iw = x.shape[-2:]
        x = F.pad(x, [ih % 2, 1, iw % 2, 1])
        return F.conv2d(x, self.weight, self.bias)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1).contiguous()


class ConditionalConv2d(nn.Conv2d):
    """Kernels chosen by the input: the non-linearity comes before the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        choice = torch.softmax(F.relu(x.mean((2, 3))), 1)
        weight = (choice[:, :, None, None, None] * self.weight).view(b * c, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return x.view(b, c, h, w) + self.bias.view(1, -1, 1, 1)


class ActivatedInputConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class ScaledConv2d(nn.Conv2d):
    """A convolution in two steps: a depthwise one inside, then the module's own."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.depthwise = NormedConv2d()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(self.depthwise(x).relu())


@pytest.mark.parametrize(
    "layer",
    [
        NormedConv2d(),
        NormedConv2d(norm=nn.Identity()),
        NormedConv2d(norm=nn.Dropout(0.1)),
        PaddedConv2d(8, 8, 3),
        StandardisedConv2d(8, 8, 3),
        ConditionalConv2d(8, 8, 3),
        ActivatedInputConv2d(8, 8, 3, padding=1),
        ScaledConv2d(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_plan_accepts_a_convolution_that_nothing_follows(layer: nn.Module) -> None:
    net = nn.Sequential(basic(conv2=layer))
    found = plan(net)
    assert ([i.path for i in found], found.unanalysed) == (["0.conv2"], ())
    assert plan(net, where="0.conv2")[0].reason == "selected by where="
    assert plan(attach(net)) == found


class GatedConv2d(NormedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(super().forward(x))


class SometimesActivatedConv2d(NormedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.relu(y) if x.shape[0] > 1 else y


class SelfNormedConv2d(NormedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)


class OuterConv2d(NormedConv2d):
    """The module that it runs is the convolution with the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NormedConv2d(norm=nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


FOLLOWED = [
    (NormedConv2d(norm=nn.BatchNorm2d(8)), "BatchNorm2d"),
    (NormedConv2d(norm=nn.GroupNorm(2, 8)), "GroupNorm"),
    (NormedConv2d(norm=FrozenNorm()), "FrozenNorm"),
    (NormedConv2d(norm=nn.BatchNorm2d(8), activation=F.relu), "BatchNorm2d, relu"),
    (NormedConv2d(activation=nn.SiLU()), "SiLU"),
    (NormedConv2d(activation=torch.relu_), "relu_"),
    (NormedConv2d(activation=lambda x: x.clamp(min=0)), "clamp"),
    (NormedConv2d(activation=lambda x: F.layer_norm(x, x.shape[1:])), "layer_norm"),
    (GatedConv2d(), "sigmoid, mul"),
    (SometimesActivatedConv2d(), "relu"),
    (SelfNormedConv2d(), "truediv"),
    (OuterConv2d(), "BatchNorm2d"),
]
ids = [f"{type(layer).__name__}-{behind}" for layer, behind in FOLLOWED]


@pytest.mark.parametrize(("layer", "behind"), FOLLOWED, ids=ids)
def test_plan_leaves_out_a_convolution_that_goes_on_to_a_norm(
    layer: nn.Module, behind: str
) -> None:
    found = plan(nn.Sequential(basic(), basic(conv2=layer)))
    assert [i.path for i in found] == ["0.conv2"]
    (unanalysed,) = found.unanalysed
    assert unanalysed.block == "1"
    assert unanalysed.reason == (
        f"basic, no host for place='conv': the forward of conv2 ({type(layer).__name__}) "
        f"goes on to {behind}; name conv2 in where= to put SimAM behind all of it"
    )


@pytest.mark.parametrize(("layer", "behind"), FOLLOWED[:5], ids=ids[:5])
def test_plan_where_says_what_comes_between(layer: nn.Module, behind: str) -> None:
    net = nn.Sequential(basic(conv2=layer))
    (insertion,) = plan(net, where="0.conv2")
    assert insertion.reason == f"selected by where=; behind {behind} of this {type(layer).__name__}"
    x = torch.randn(2, 8, 6, 6)
    plain = net[0].conv2(x)
    attach(net, where="0.conv2")
    torch.testing.assert_close(net[0].conv2(x), net[0].conv2.simam(plain))
    assert plan(net, where="0.conv2") == [insertion]
    detach(net)


def test_plan_place_norm_accepts_a_norm_inside_the_convolution() -> None:
    net = nn.Sequential(
        basic(conv2=NormedConv2d(norm=nn.BatchNorm2d(8))),
        basic(conv2=NormedConv2d(norm=FrozenNorm(), activation=F.relu)),
    )
    found = plan(net, place="norm")
    assert [(i.path, i.reason) for i in found] == [
        ("0.conv2", "norm inside the last spatial convolution of the residual branch of basic"),
        (
            "1.conv2",
            "norm with its activation inside the last spatial convolution of the residual branch "
            "of basic",
        ),
    ]


class UntraceableConv2d(NormedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[: int(x.sum())])


def test_plan_leaves_out_a_convolution_that_cannot_be_traced() -> None:
    net = nn.Sequential(basic(), basic(conv2=UntraceableConv2d()))
    found = plan(net)
    assert [i.path for i in found] == ["0.conv2"]
    (unanalysed,) = found.unanalysed
    assert re.fullmatch(
        r"basic, no host for place='conv': the forward of conv2 \(UntraceableConv2d\) cannot be "
        r"traced \(TypeError: .*\); name conv2 in where= to put SimAM behind all of it",
        unanalysed.reason,
    )
    (insertion,) = plan(net, where="1.conv2")
    assert insertion.reason == "selected by where=; behind the whole UntraceableConv2d"


def test_plan_refuses_a_network_of_normed_convolutions() -> None:
    parts = {name: NormedConv2d(nn.BatchNorm2d(8), F.relu) for name in ("conv1", "conv2")}
    net = nn.Sequential(basic(**parts))
    with pytest.raises(ValueError, match=r"^found no place .*goes on to BatchNorm2d, relu"):
        attach(net)
    assert [i.path for i in plan(net, place="norm")] == ["0.conv2"]


@block
def activated_inside(self, x):
    return x + self.conv2(self.conv1(x))


def test_rule_counts_an_activation_inside_a_convolution() -> None:
    assert host_paths(activated_inside(conv1=NormedConv2d(activation=F.relu))) == ["conv2"]


def test_plan_reports_a_left_out_block_that_contains_an_insertion() -> None:
    @block
    def group(self, x):
        return x + self.end(self.body(x))

    net = group(body=nn.Sequential(basic()), end=NormedConv2d(norm=nn.BatchNorm2d(8)))
    found = plan(net)
    assert [i.path for i in found] == ["body.0.conv2"]
    assert [u.block for u in found.unanalysed] == [""]


def test_plan_ignores_a_normed_convolution_elsewhere() -> None:
    net = nn.Sequential(NormedConv2d(nn.BatchNorm2d(8), F.relu), basic(conv1=NormedConv2d()))
    found = plan(net)
    assert ([i.path for i in found], found.unanalysed) == (["1.conv2"], ())


def test_plan_accepts_convolution_classes_of_timm() -> None:
    pytest.importorskip("timm")
    from timm.layers import CondConv2d, Conv2dSame, MixedConv2d, ScaledStdConv2d, StdConv2d

    layers = [
        Conv2dSame(8, 8, 3),
        StdConv2d(8, 8, 3, padding=1),
        ScaledStdConv2d(8, 8, 3, padding=1),
        MixedConv2d(8, 8, [3, 5]),
    ]
    hosts = ["0.conv2", "1.conv2", "2.conv2", "3.conv2.0", "3.conv2.1"]
    assert host_paths(nn.Sequential(*(basic(conv2=layer) for layer in layers))) == hosts

    @block
    def routed(self, x, weights):
        return x + self.conv2(self.conv1(x).relu(), weights)

    assert host_paths(routed(conv2=CondConv2d(8, 8, 3, padding=1, num_experts=4))) == ["conv2"]


def test_plan_accepts_the_deformable_convolution_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    from torchvision.ops import DeformConv2d

    @block
    def deformed(self, x):
        x1 = self.conv1(x).relu()
        return x + self.conv2(x1, self.offset(x1), self.mask(x1).sigmoid())

    net = deformed(conv2=DeformConv2d(8, 8, 3, padding=1), offset=conv(), mask=conv())
    assert host_paths(net) == ["conv2"]
