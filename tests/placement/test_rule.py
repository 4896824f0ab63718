"""The rule, clause by clause: which convolutions of a residual block SimAM follows."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from simam import SimAM, attach, plan
from tests.helpers.tiny_blocks import Block, basic, block, conv, host_paths


@block
def bottleneck(self, x):
    return x + self.conv3(self.conv2(self.conv1(x).relu()).relu())


def test_rule_selects_the_last_spatial_convolution() -> None:
    wide = bottleneck(conv2=conv(5), conv3=conv(1))
    deep = bottleneck(conv3=conv(3))
    net = nn.Sequential(basic(), bottleneck(conv1=conv(1), conv3=conv(1)), wide, deep)
    assert host_paths(net) == ["0.conv2", "1.conv2", "2.conv2", "3.conv3"]


def test_insertion_names_the_block() -> None:
    first, second = plan(nn.Sequential(basic(), bottleneck(conv3=conv(5))))
    assert (first.block, first.host) == ("0", "Conv2d 3x3")
    assert (second.block, second.host) == ("1", "Conv2d 5x5")
    assert first.reason == "last spatial convolution of the residual branch of basic"


def test_rule_accepts_the_model_as_the_block() -> None:
    (insertion,) = plan(basic())
    assert (insertion.path, insertion.block) == ("conv2", "")


@block
def in_place(self, x):
    y = self.branch(x)
    y += x
    return y


@block
def function(self, x):
    return torch.add(x, self.branch(x), alpha=0.1)


@block
def method(self, x):
    return self.branch(x).add_(x)


@block
def scaled_channels_last(self, x):
    y = self.branch(x).permute(0, 2, 3, 1)
    y = F.dropout(y * torch.ones(8), 0.1, self.training)
    return x + y.permute(0, 3, 1, 2)


@block
def one_of_several_inputs(self, x, mask=None, *, scale=1.0):
    if mask is not None:
        x = x * mask
    return x + scale * self.branch(x)


@block
def item_of_a_list(self, features):
    x = features[0]
    return [x + self.branch(x), features[1]]


@block
def value_of_a_dict(self, batch):
    x = batch["image"]
    return {"image": x + self.branch(x)}


@block
def checkpointed(self, x):
    return x + checkpoint(self.branch, x, use_reentrant=False)


@block
def summed_by_the_builtin(self, x):
    return sum([x, self.branch(x)])


@block
def summed_from_a_number(self, x):
    y = 0
    for convolution in (self.conv2,):
        y += convolution(self.conv1(x).relu())
    return x + y


@block
def summed_on_a_number(self, x):
    y = 0.0
    y = y + self.branch(x)
    y += x
    return y


@block
def conditioned(self, x, embedding):
    y = self.conv1(x).relu() + embedding.mean()
    return x + self.conv2(y.relu())


@block
def modulated(self, x, scale):
    return x + self.conv2(self.conv1(x) * (1 + scale.relu()))


@block
def with_a_warning(self, x):
    warnings.warn("this block is going out of use", stacklevel=1)
    return x + self.branch(x)


@block
def recursive(self, x):
    y = x
    for _ in range(3):
        y = x + self.branch(y.relu())
    return y


@pytest.mark.parametrize(
    "kind",
    [
        in_place,
        function,
        method,
        scaled_channels_last,
        one_of_several_inputs,
        item_of_a_list,
        value_of_a_dict,
        checkpointed,
        recursive,
        with_a_warning,
        summed_by_the_builtin,
        summed_from_a_number,
        summed_on_a_number,
        conditioned,
        modulated,
    ],
)
def test_rule_recognises_every_spelling_of_the_sum(kind: type[Block]) -> None:
    assert host_paths(kind()) == ["conv2"]


def test_rule_analyses_a_class_without_source() -> None:
    names = {"Block": Block, "__name__": "__main__"}
    exec("class Typed(Block):\n def forward(self, x): return x + self.branch(x)", names)
    assert host_paths(names["Typed"]()) == ["conv2"]


@pytest.mark.parametrize(
    "shortcut",
    [
        nn.Sequential(conv(1), nn.BatchNorm2d(8)),
        nn.Sequential(nn.AvgPool2d(2), conv(3), nn.BatchNorm2d(8)),
        nn.MaxPool2d(3),
    ],
    ids=["projection", "spatial", "pool"],
)
def test_rule_ignores_convolutions_on_the_shortcut(shortcut: nn.Module) -> None:
    @block
    def projected(self, x):
        return self.branch(x) + self.shortcut(x)

    assert host_paths(projected(shortcut=shortcut)) == ["conv2"]


def test_rule_accepts_an_activation_shared_with_the_shortcut() -> None:
    @block
    def pre_activation(self, x):
        out = self.norm(x).relu()
        return self.branch(out) + self.shortcut(out)

    assert host_paths(pre_activation(norm=nn.BatchNorm2d(8), shortcut=conv(1))) == ["conv2"]


def test_rule_handles_groups_of_residual_blocks() -> None:
    @block
    def group(self, x):
        return x + self.end(self.body(x))

    body = nn.Sequential(basic(), basic())
    inner = ["body.0.conv2", "body.1.conv2"]
    assert host_paths(group(body=body, end=conv())) == [*inner, "end"]
    assert host_paths(group(body=body, end=nn.Identity())) == inner


@block
def squeeze_excite(self, x):
    return self.conv2(self.conv1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@block
def efficient_channels(self, x):
    weights = self.conv1(x.mean((2, 3)).unsqueeze(1)).sigmoid()
    return weights.view(x.shape[0], -1, 1, 1).expand_as(x)


@block
def where_to_look(self, x):
    summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return F.hardsigmoid(self.conv1(summary))


@pytest.mark.parametrize(
    "gate",
    [
        squeeze_excite(),
        efficient_channels(conv1=nn.Conv1d(1, 1, 3, padding=1)),
        where_to_look(conv1=nn.Conv2d(2, 1, 7, padding=3)),
    ],
    ids=["SE", "ECA", "CBAM"],
)
def test_rule_does_not_follow_gates(gate: nn.Module) -> None:
    @block
    def gated(self, x):
        y = self.branch(x)
        return x + y * self.gate(y)

    assert host_paths(gated(gate=gate)) == ["conv2"]


def test_rule_selects_parallel_convolutions() -> None:
    @block
    def parallel(self, x):
        y = self.conv1(x).relu()
        return x + self.out(torch.cat([self.conv2(y), self.conv3(y), self.pooled(x)], 1))

    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(3))
    net = parallel(conv3=conv(5), pooled=pooled, out=conv(1, 24))
    assert host_paths(net) == ["conv2", "conv3", "pooled.1"]
    assert "1 of 3 in parallel" in plan(net)[0].reason


def test_rule_follows_paths_weighted_by_a_softmax() -> None:
    @block
    def selective(self, x):
        paths = torch.stack([self.conv1(x).relu(), self.conv2(x).relu()], 1)
        weights = self.conv3(paths.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, 4, 1, 1)
        return x + (paths * weights.softmax(1).repeat(1, 1, 2, 1, 1)).sum(1)

    assert host_paths(selective(conv3=conv(1))) == ["conv1", "conv2"]


def test_simam_on_parallel_convolutions_equals_simam_on_their_concatenation() -> None:
    @block
    def halves(self, x):
        first, second = x.chunk(2, 1)
        return torch.cat([self.conv1(first), self.conv2(second)], 1)

    torch.manual_seed(0)
    net = halves(conv1=nn.Conv2d(4, 4, 3), conv2=nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 8, 6, 6)
    expected = SimAM()(net(x))
    torch.testing.assert_close(attach(net, where="*")(x), expected)


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv3d])
def test_rule_handles_signals_and_videos(convolution: type[nn.Module]) -> None:
    net = basic(conv1=convolution(8, 8, 3, padding=1), conv2=convolution(8, 8, 3, padding=1))
    assert host_paths(net) == ["conv2"]


def test_rule_counts_a_kernel_that_is_spatial_in_one_dimension() -> None:
    @block
    def factorised(self, x):
        return x + self.conv3(self.conv2(self.conv1(x).relu()))

    across, through = nn.Conv3d(8, 8, (1, 3, 3)), nn.Conv3d(8, 8, (3, 1, 1))
    net = factorised(conv1=across, conv2=through, conv3=nn.Conv3d(8, 8, 1))
    assert host_paths(net) == ["conv2"]


def test_rule_counts_a_custom_convolution_class() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std(), self.bias, padding=1)

    assert host_paths(basic(conv2=Standardised(8, 8, 3))) == ["conv2"]
