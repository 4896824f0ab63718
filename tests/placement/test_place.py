"""plan with place=: the hosts behind the norm and at the end of the branch."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simam import Insertion, plan
from tests.helpers.tiny_blocks import Block, block, conv


class NormAct(nn.BatchNorm2d):
    """A norm that applies an activation itself, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(x)


class DropPath(nn.Module):
    """Stochastic depth as in timm: in evaluation mode it returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), 1, 1, 1) if self.training else x


class ConvBN(nn.Module):
    """A convolution, its norm and perhaps an activation that other blocks use, too."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), norm(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class GroupRMSNorm(nn.Module):
    """A norm with two operations on its input, in which the channels are grouped for a while."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], 2, -1) - x.mean()
        return (groups * groups.square().mean(2, keepdim=True).rsqrt()).reshape(x.shape)


def norm() -> nn.Module:
    return nn.BatchNorm2d(8)


@block
def normed(self, x):
    return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


@block
def bottleneck(self, x):
    x = x + self.norm3(self.conv3(self.norm2(self.conv2(self.conv1(x))).relu()))
    return x.relu()


@block
def ended_by(self, x):
    return x + self.end(self.norm2(self.conv2(self.conv1(x).relu())))


@block
def wrapped(self, x):
    return x + self.conv2(self.conv1(x))


@block
def parallel(self, x):
    y = self.conv1(x).relu()
    return x + self.norm2(torch.cat([self.conv2(y), self.conv3(y)], 1))[:, :8]


def hosts(model: nn.Module, place: str) -> list[tuple[str, str]]:
    return [(insertion.path, insertion.host) for insertion in plan(model, place=place)]


def test_plan_places_simam_in_a_bottleneck() -> None:
    net = bottleneck(norm2=norm(), conv3=conv(1), norm3=norm())
    reasons = {
        "conv": ("conv2", "Conv2d 3x3", "last spatial convolution"),
        "norm": ("norm2", "BatchNorm2d", "norm behind the last spatial convolution"),
        "branch": ("norm3", "BatchNorm2d", "end"),
    }
    for place, (path, host, what) in reasons.items():
        reason = f"{what} of the residual branch of bottleneck"
        assert plan(net, place=place) == [Insertion(path, "", host, reason)]
    assert plan(net) == plan(net, place="conv")


def test_plan_places_simam_behind_a_norm_with_its_activation() -> None:
    net = normed(norm1=norm(), norm2=NormAct(8, nn.ReLU()))
    (insertion,) = plan(net, place="norm")
    assert (insertion.path, insertion.host) == ("norm2", "NormAct")
    assert insertion.reason.startswith("norm with its activation behind the last spatial conv")
    assert hosts(net, "branch") == [("norm2", "NormAct")]


def test_plan_places_simam_behind_a_norm_whose_activation_is_off() -> None:
    net = normed(norm1=norm(), norm2=NormAct(8, nn.Identity()))
    (insertion,) = plan(net, place="norm")
    assert insertion.reason.startswith("norm behind the last spatial convolution")
    assert hosts(net, "branch") == [("norm2", "NormAct")]


@pytest.mark.parametrize(
    "end", [nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(), nn.Identity()], ids=repr
)
def test_plan_places_simam_before_what_scales_whole_samples(end: nn.Module) -> None:
    net = ended_by(norm2=norm(), end=nn.Sequential(end, nn.Dropout(0.1)))
    assert hosts(net, "branch") == [("norm2", "BatchNorm2d")]


def test_plan_places_simam_behind_the_last_module_of_a_sequential() -> None:
    net = wrapped(conv2=nn.Sequential(nn.ReLU(), conv(), norm(), conv(1), norm()))
    assert hosts(net, "norm") == [("conv2.2", "BatchNorm2d")]
    assert hosts(net, "branch") == [("conv2.4", "BatchNorm2d")]


def test_plan_places_simam_behind_the_outermost_module() -> None:
    act = nn.SiLU()
    net = nn.Sequential(*(wrapped(conv1=ConvBN(act), conv2=ConvBN(act)) for _ in range(2)))
    assert hosts(net, "norm") == [("0.conv2.bn", "BatchNorm2d"), ("1.conv2.bn", "BatchNorm2d")]
    assert hosts(net, "branch") == [("0.conv2", "ConvBN"), ("1.conv2", "ConvBN")]


def test_plan_places_one_simam_behind_the_norm_of_parallel_convolutions() -> None:
    net = parallel(conv3=conv(5), norm2=nn.BatchNorm2d(16))
    assert hosts(net, "norm") == [("norm2", "BatchNorm2d")]


@pytest.mark.parametrize("place", ["norm", "branch"])
def test_plan_places_simam_behind_a_norm_of_several_operations(place: str) -> None:
    net = normed(norm1=norm(), norm2=GroupRMSNorm())
    assert hosts(net, place) == [("norm2", "GroupRMSNorm")]


def test_plan_places_simam_where_the_skip_is_off() -> None:
    @block
    def maybe_residual(self, x):
        y = self.norm2(self.conv2(self.conv1(x).relu()))
        return y if self.down else x + y

    nets = [maybe_residual(norm2=norm()), maybe_residual(norm2=norm())]
    nets[0].down, nets[1].down = True, False
    net = nn.Sequential(*nets)
    for place in ("norm", "branch"):
        assert [path for path, _ in hosts(net, place)] == ["0.norm2", "1.norm2"]


def functional_norm(self: Block, x: Tensor) -> Tensor:
    return x + F.instance_norm(self.conv2(self.conv1(x).relu()))


def no_norm(self: Block, x: Tensor) -> Tensor:
    return x + self.norm2(self.conv2(self.conv1(x).relu()).relu())


def forked(self: Block, x: Tensor) -> Tensor:
    y = self.conv2(self.conv1(x).relu())
    return x + self.norm2(y) * y.mean()


def scaled(self: Block, x: Tensor) -> Tensor:
    return x + self.scale.weight.view(8, 1, 1) * self.norm2(self.conv2(self.conv1(x).relu()))


def norm_used_twice(self: Block, x: Tensor) -> Tensor:
    return x + self.norm2(self.conv2(self.norm2(self.conv1(x)).relu()))


def used_twice(self: Block, x: Tensor) -> Tensor:
    y = self.norm2(self.conv2(self.conv1(x).relu()))
    return x + y, y


def reordered(self: Block, x: Tensor) -> Tensor:
    y = self.conv2(self.conv1(x).relu()).permute(0, 2, 3, 1)
    return x + self.linear(y)


def shared_end(self: Block, x: Tensor) -> Tensor:
    return x + self.act(self.norm2(self.conv2(self.act(self.conv1(x)))))


@pytest.mark.parametrize(
    ("forward", "place", "reason"),
    [
        (functional_norm, "norm", "conv2 is followed by a functional norm, no module"),
        (functional_norm, "branch", "it ends in the function instance_norm"),
        (no_norm, "norm", "conv2 is not followed by a norm, but by relu"),
        (forked, "norm", "conv2 is followed by 2 operations"),
        (scaled, "branch", "it ends in the function mul with scale.weight, and no module"),
        (norm_used_twice, "norm", "norm2 runs more than once"),
        (used_twice, "branch", "the end of the branch has other uses than the add"),
        (reordered, "branch", "reorders dimensions at the end of the branch"),
        (shared_end, "branch", "it ends in a relu that the model uses more than once"),
    ],
)
def test_plan_names_a_block_without_host(forward: object, place: str, reason: str) -> None:
    kind = block(forward)
    net = nn.Sequential(
        kind(norm2=norm(), scale=nn.Linear(8, 1), linear=nn.Linear(8, 8), act=nn.ReLU()),
        normed(norm1=norm(), norm2=norm()),
    )
    found = plan(net, place=place)
    assert [insertion.path for insertion in found] == ["1.norm2"]
    (unanalysed,) = found.unanalysed
    assert unanalysed.block == "0"
    prefix = f"{kind.__name__}, no host for place='{place}': "
    assert unanalysed.reason.startswith(prefix)
    assert reason in unanalysed.reason
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        plan(net[0], place=place)
    assert f"with a host for place='{place}'" in str(error.value)
    assert len(plan(net)) == 2


def test_plan_names_a_block_that_returns_its_convolution() -> None:
    @block
    def maybe_normed(self, x):
        y = self.conv2(self.conv1(x).relu())
        return y if self.down else x + self.norm2(y)

    nets = [maybe_normed(norm2=norm()), maybe_normed(norm2=norm())]
    nets[0].down, nets[1].down = True, False
    found = plan(nn.Sequential(*nets), place="norm")
    assert [insertion.path for insertion in found] == ["1.norm2"]
    (unanalysed,) = found.unanalysed
    assert unanalysed.reason.endswith(
        "conv2 is not followed by a norm, but by the end of the block"
    )


@block
def scaled_body(self, x):
    return x + 0.2 * self.body(x)


def test_plan_names_a_block_without_host_around_blocks_with_hosts() -> None:
    net = nn.Sequential(scaled_body(body=normed(norm1=norm(), norm2=norm())))
    found = plan(net, place="branch")
    assert [insertion.path for insertion in found] == ["0.body.norm2"]
    (unanalysed,) = found.unanalysed
    assert unanalysed.block == "0"
    assert unanalysed.reason.startswith("scaled_body, no host for place='branch': it ends in the")


def test_plan_names_no_block_that_has_a_host_at_the_end_of_another_branch() -> None:
    @block
    def chain(self, x):  # as in Res2Net, where a branch within the branch ends in an activation
        y = self.conv1(x).relu()
        return x + self.norm2(self.conv2(y + x))

    found = plan(chain(norm2=norm()), place="branch")
    assert [insertion.path for insertion in found] == ["norm2"]
    assert not found.unanalysed


@pytest.mark.parametrize("place", ["bn", "", None, "Conv"])
def test_plan_refuses_an_unknown_place(place: object) -> None:
    with pytest.raises(ValueError, match=r"^place must be one of 'conv', 'norm', 'branch', got "):
        plan(normed(norm1=norm(), norm2=norm()), place=place)
