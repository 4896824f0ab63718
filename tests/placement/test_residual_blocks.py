"""Which blocks the rule takes for residual blocks with something to gate, and which not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simam import plan
from tests.helpers.tiny_blocks import Block, assert_refused, basic, block, conv, points

# Those with a formula for one value alone: a softmax is attention, and a GLU a gate.
ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU,
    nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
]  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_rule_counts_every_torch_activation_as_non_linear(kind: type[nn.Module]) -> None:
    @block
    def activated(self, x):
        return x + self.conv2(self.act(self.conv1(x)))

    assert points(activated(act=kind())) == ["conv2"]


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x.sigmoid()


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        Swish.apply,
        lambda x: x.clamp(min=0),
        lambda x: x * torch.sigmoid(x),
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * torch.tanh(F.softplus(x)),
    ],
    ids=["gelu", "Function", "clamp", "swish", "hardswish", "mish"],
)
def test_rule_counts_a_hand_written_activation_as_non_linear(
    function: Callable[[Tensor], Tensor],
) -> None:
    @block
    def activated(self, x):
        return x + self.conv2(function(self.conv1(x)))

    assert points(activated()) == ["conv2"]


@block
def foldable(self, x):
    return (self.conv1(x) + self.conv3(x) + self.norm(x)).relu()


@block
def foldable_branch(self, x):
    y = x.relu()
    return x + self.norm(self.conv1(y) + self.conv3(y))


@block
def position(self, x):
    return x + self.conv3(x)


@block
def attention(self, x):
    small = self.conv3(x)
    weights = (x.flatten(2).transpose(1, 2) @ small.flatten(2)).softmax(-1)
    return x + (small.flatten(2) @ weights.transpose(1, 2)).view_as(x)


@block
def attention_of_torch(self, x):
    q, k, v = (c(x).flatten(2).mT for c in (self.conv1, self.conv2, self.conv3))
    return x + F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)


@block
def two_branches(self, x):
    return self.conv1(x).relu() + self.conv2(x).relu()


@block
def hourglass(self, x):
    around = F.interpolate(self.conv2(F.max_pool2d(x, 2)).relu(), scale_factor=2)
    return self.conv1(x).relu() + around


@block
def inputs_without_a_common_ancestor(self, x, y):
    return x + self.branch(y)


@block
def constant(self, x):
    return self.branch(x + 1) + torch.ones(8, 1, 1)


@block
def concatenation(self, x):
    return torch.cat([x, self.branch(x)], 1)


@block
def recurrent(self, hidden, x):
    return hidden + self.conv2(torch.cat([hidden, x], 1)).tanh()


@block
def gated_recurrent(self, hidden, x):
    both = torch.cat([hidden, x], 1)
    update, reset = self.conv1(both).sigmoid(), self.conv2(both).sigmoid()
    new = self.conv3(torch.cat([reset * hidden, x], 1)).tanh()
    return (1 - update) * hidden + update * new


@block
def long_short_term(self, x, state):
    hidden, cell = state
    keep, write, show, new = self.conv1(torch.cat([hidden, x], 1)).chunk(4, 1)
    cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


@block
def searched_cell(self, x):
    y = self.conv1(x.relu())
    first = F.avg_pool2d(y, 3, 1, 1) + self.conv2(y.relu())
    second = y + self.conv3(y.relu())
    return torch.cat([first, second, y], 1)


@block
def pyramid(self, features):
    fine, coarse = features
    return self.conv2(self.conv1(fine).relu() + F.interpolate(self.conv3(coarse), scale_factor=2))


@block
def resolutions(self, features):
    fine, coarse = features[0], features[1]
    up = F.interpolate(self.conv1(coarse), scale_factor=2)
    return [(fine + up).relu(), (self.conv2(self.conv3(fine).relu()) + coarse).relu()]


@block
def without_convolutions(self, x):
    return x + self.norm(x).relu()


NOT_RESIDUAL = [
    foldable,
    foldable_branch,
    position,
    attention,
    attention_of_torch,
    two_branches,
    hourglass,
    inputs_without_a_common_ancestor,
    constant,
    concatenation,
    recurrent,
    gated_recurrent,
    long_short_term,
    searched_cell,
    pyramid,
    resolutions,
    without_convolutions,
]


@pytest.mark.parametrize("kind", NOT_RESIDUAL)
def test_rule_refuses_blocks_that_are_not_residual(kind: type[Block]) -> None:
    parts = {"conv3": conv(groups=8), "norm": nn.BatchNorm2d(8)}
    assert_refused(kind(**parts))
    assert points(nn.ModuleList([kind(**parts), basic()])) == ["1.conv2"]


def test_rule_counts_a_convolution_after_attention() -> None:
    @block
    def mixed(self, x):
        weights = (self.conv1(x).flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1)
        y = (x.flatten(2) @ weights).view_as(x)
        return x + self.conv2(y.relu())

    assert points(mixed()) == ["conv2"]


class Inverted(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(1), nn.ReLU6(), conv(stride=stride, groups=8), conv(1))
        self.has_shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.has_shortcut:
            return x + self.conv(x)
        return self.conv(x)


def test_rule_counts_a_block_without_skip_with_its_class() -> None:
    net = nn.Sequential(Inverted(2), Inverted(1), Inverted(2))
    assert points(net) == ["0.conv.2", "1.conv.2", "2.conv.2"]
    assert plan(net)[0].reason == "last spatial convolution of Inverted, whose skip is off here"


def test_rule_ignores_a_class_that_is_never_residual() -> None:
    @block
    def summed(self, x):
        return self.conv1(x).relu() + self.conv2(x).relu()

    assert points(nn.Sequential(summed(), basic(), summed())) == ["1.conv2"]


def test_rule_does_not_take_a_container_for_its_blocks() -> None:
    @block
    def shifted(self, x):
        return self.body(x) + 1

    straight = nn.Sequential(conv(), nn.ReLU(), conv())
    net = nn.Sequential(shifted(body=basic()), shifted(body=straight))
    assert points(net) == ["0.body.conv2"]


@block
def matched(self, x):
    batch, channels, height, width = x.shape
    y = self.branch(x)
    if y.shape[2:] != (height, width):
        y = F.interpolate(y, (height, width))
    if y.size(1) < channels:
        raise ValueError(f"{batch} samples have lost channels")
    assert x.shape == y.shape
    return x + y


@block
def summed_where_it_fits(self, x):
    y = self.branch(x)
    if x.shape == y.shape:
        y = y + x
    return y


@block
def checked(self, x):
    if x.dim() != 4:
        raise ValueError("expected a batch of images")
    if not torch.jit.is_scripting() and x.requires_grad:
        return x + self.branch(x)
    return x + self.branch(x)


@pytest.mark.parametrize("kind", [matched, summed_where_it_fits, checked])
def test_rule_follows_conditions_on_shapes(kind: type[Block]) -> None:
    assert points(kind()) == ["conv2"]
