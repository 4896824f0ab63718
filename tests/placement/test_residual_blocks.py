"""The rule: which blocks count as residual blocks, and which do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simam import plan
from tests.helpers.tiny_blocks import Block, assert_refused, basic, block, conv, host_paths

# Elementwise activations only: a softmax is attention, and a GLU is a gate.
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

    assert host_paths(activated(act=kind())) == ["conv2"]


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

    assert host_paths(activated()) == ["conv2"]


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
    down = self.conv2(self.conv3(F.max_pool2d(fine, 2)).relu())
    return [(fine + up).relu(), (down + coarse).relu()]


@block
def without_convolutions(self, x):
    return x + self.norm(x).relu()


@block
def constant_of_the_dtype(self, x):
    return self.branch(x) + self.norm.weight.view(-1, 1, 1).type_as(x)


@block
def constant_moved_to_the_device(self, x):
    return self.norm.bias.view(-1, 1, 1).to(x) + self.branch(x)


@block
def zeros(self, x):
    return self.branch(x) + torch.zeros_like(x) + x.new_zeros(1)


@block
def pyramid_of_one_input(self, x):
    fine = self.conv1(x)
    coarse = self.conv2(F.avg_pool2d(fine, 2).relu())
    return fine + F.interpolate(coarse, scale_factor=2)


@block
def pyramid_joined_to_an_upsampled_stream(self, x):
    coarse = F.avg_pool2d(x, 2)
    return F.interpolate(coarse, scale_factor=2) + self.conv2(self.conv1(x).relu())


@block
def pixel_shuffled(self, x):
    y = self.conv2(F.max_pool2d(self.conv1(x).relu(), 2))
    return x + F.pixel_shuffle(y.repeat(1, 4, 1, 1), 2)


@block
def transposed(self, x):
    return x + self.up(self.conv2(F.max_pool2d(self.conv1(x).relu(), 2)))


@block
def skip_of_a_u(self, x):
    return x + self.conv2(self.up(F.max_pool2d(self.conv1(x).relu(), 2)))


@block
def folded_with_a_projection(self, x):
    y = self.conv1(x).relu()
    return x + (self.conv2(y) + self.point(y)).relu()


NOT_RESIDUAL = [
    constant_of_the_dtype,
    constant_moved_to_the_device,
    zeros,
    pyramid_of_one_input,
    pyramid_joined_to_an_upsampled_stream,
    pixel_shuffled,
    transposed,
    skip_of_a_u,
    folded_with_a_projection,
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


def parts() -> dict[str, nn.Module]:
    """What the blocks above have beside their two convolutions."""
    up = nn.ConvTranspose2d(8, 8, 2, stride=2)
    return {"conv3": conv(groups=8), "norm": nn.BatchNorm2d(8), "up": up, "point": conv(1)}


@pytest.mark.parametrize("kind", NOT_RESIDUAL)
def test_rule_refuses_blocks_that_are_not_residual(kind: type[Block]) -> None:
    assert_refused(kind(**parts()))
    assert host_paths(nn.ModuleList([kind(**parts()), basic()])) == ["1.conv2"]


MAP, SMALL_MAP = torch.zeros(2, 8, 8, 8), torch.zeros(2, 8, 4, 4)
EXAMPLES = {
    inputs_without_a_common_ancestor: (MAP, MAP),
    recurrent: (MAP, torch.zeros(2, 0, 8, 8)),
    gated_recurrent: (MAP, torch.zeros(2, 0, 8, 8)),
    long_short_term: (torch.zeros(2, 4, 8, 8), (torch.zeros(2, 4, 8, 8), torch.zeros(2, 2, 8, 8))),
    pyramid: ([MAP, SMALL_MAP],),
    resolutions: ([MAP, SMALL_MAP],),
}


@pytest.mark.parametrize("kind", NOT_RESIDUAL)
def test_rule_refuses_the_same_blocks_with_an_example(kind: type[Block]) -> None:
    example = EXAMPLES.get(kind, MAP)
    with pytest.raises(ValueError, match=r"^found no place for SimAM"):
        plan(kind(**parts()), example=example)


def test_rule_counts_a_convolution_after_attention() -> None:
    @block
    def mixed(self, x):
        weights = (self.conv1(x).flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1)
        y = (x.flatten(2) @ weights).view_as(x)
        return x + self.conv2(y.relu())

    assert host_paths(mixed()) == ["conv2"]


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
    assert host_paths(net) == ["0.conv.2", "1.conv.2", "2.conv.2"]
    assert plan(net)[0].reason == "last spatial convolution of Inverted, whose skip is off here"


def test_rule_ignores_a_class_that_is_never_residual() -> None:
    @block
    def summed(self, x):
        return self.conv1(x).relu() + self.conv2(x).relu()

    assert host_paths(nn.Sequential(summed(), basic(), summed())) == ["1.conv2"]


def test_rule_does_not_take_a_container_for_its_blocks() -> None:
    @block
    def shifted(self, x):
        return self.body(x) + 1

    straight = nn.Sequential(conv(), nn.ReLU(), conv())
    net = nn.Sequential(shifted(body=basic()), shifted(body=straight))
    assert host_paths(net) == ["0.body.conv2"]


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
    assert host_paths(kind()) == ["conv2"]


@block
def shaken(self, x):
    y, z = self.conv1(x).relu(), self.conv3(x).relu()
    return x + 0.5 * (self.conv2(y) + self.conv4(z))


@block
def joined_by_its_input(self, x):
    y = self.conv1(x).relu()
    return x + (self.norm(self.conv2(y)) + y).relu()


@pytest.mark.parametrize(
    ("kind", "hosts"), [(shaken, ["conv2", "conv4"]), (joined_by_its_input, ["conv2"])]
)
@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_counts_a_sum_within_the_branch(
    kind: type[Block], hosts: list[str], example: Tensor | None
) -> None:
    net = kind(conv3=conv(), conv4=conv(), norm=nn.BatchNorm2d(8))
    assert host_paths(net, example) == hosts


@block
def upsampled_on_both_sides(self, x):
    y = F.interpolate(self.norm(x).relu(), scale_factor=2)
    return F.interpolate(x, scale_factor=2) + self.conv2(self.conv1(y).relu())


@block
def upsampled_before(self, x):
    x = F.interpolate(x, scale_factor=2)
    return x + self.branch(x)


@pytest.mark.parametrize("kind", [upsampled_on_both_sides, upsampled_before])
@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_counts_a_block_that_upsamples_both_sides(
    kind: type[Block], example: Tensor | None
) -> None:
    net = nn.Sequential(kind(norm=nn.BatchNorm2d(8)), basic())
    assert host_paths(net, example) == ["0.conv2", "1.conv2"]


class Ghost(nn.Module):
    """Where the stride is 2, the shortcut is convolution, norm, ReLU, convolution."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(stride=stride), conv()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                conv(stride=stride, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(1)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.conv1(x).relu())


@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_tells_the_branch_from_a_shortcut_by_the_other_blocks(
    example: Tensor | None,
) -> None:
    net = nn.Sequential(Ghost(2), Ghost(1), Ghost(2))
    assert host_paths(net, example) == ["0.conv2", "1.conv2", "2.conv2"]
    assert plan(net, example=example)[0].reason == (
        "last spatial convolution of the residual branch of Ghost"
    )


class SuperResolution(nn.Module):
    """A body between a head and a tail, as in EDSR."""

    def __init__(self, *, over_the_body: bool) -> None:
        super().__init__()
        self.head, self.body = conv(), nn.Sequential(basic(), basic())
        self.after_body, self.up, self.tail = conv(), conv(), nn.Conv2d(2, 8, 3, padding=1)
        self.over_the_body = over_the_body
        self.mean = torch.ones(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x - self.mean.type_as(x))
        deep = self.after_body(self.body(y))
        y = y + deep if self.over_the_body else deep
        large = self.tail(F.pixel_shuffle(self.up(y).relu(), 2))
        return large + F.interpolate(x, scale_factor=2) + self.mean.type_as(x)


@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_ignores_sums_over_the_resolutions_of_a_network(example: Tensor | None) -> None:
    blocks = ["body.0.conv2", "body.1.conv2"]
    assert host_paths(SuperResolution(over_the_body=False), example) == blocks
    assert host_paths(SuperResolution(over_the_body=True), example) == [*blocks, "after_body"]


@block
def dense_stages(self, x):
    first = self.conv1(torch.cat([x, self.body(x)], 1)).relu()
    return x + self.conv2(torch.cat([x, first], 1)).relu()


@block
def recurrent_network(self, x):
    state, flow = self.body(x), x[:, :2]
    for _ in range(2):
        state, change = self.update(state, flow)
        flow = flow + change
    return flow


class Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_flow, self.mix, self.head1, self.head2 = (
            conv(channels=2), conv(channels=16), conv(), nn.Conv2d(8, 2, 3, padding=1),
        )  # fmt: skip

    def forward(self, state: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        state = self.mix(torch.cat([state, self.of_flow(flow).relu()], 1)).tanh()
        return state, self.head2(self.head1(state).relu())


@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: dense_stages(body=basic(), conv1=conv(channels=16), conv2=conv(channels=16)),
        lambda: recurrent_network(body=basic(), update=Update()),
    ],
    ids=["dense", "recurrent"],
)
def test_rule_ignores_sums_over_the_stages_of_a_network(
    make: Callable[[], nn.Module], example: Tensor | None
) -> None:
    assert host_paths(make(), example) == ["body.conv2"]


@block
def numbered(self, features):
    for i in range(len(features) - 1):
        features[i] = self.conv1(features[i + 1]).relu()
    return features


@block
def top_down(self, features):
    last = self.conv1(features[-1])
    for each in features[::-1]:
        upsampled = F.interpolate(last, scale_factor=2)
        last = self.conv2(each) + upsampled
    return last.relu()


@block
def counted(self, features):
    total, offset = 0, 1
    for each in features:
        total += len(each)
        offset += 1
    return self.conv1(features[offset]).relu(), total


@block
def offset(self, features):
    offset, rows = 0, []
    for each in features:
        count = each.shape[1]
        rows.append(each[offset : offset + count])
        offset += count
    return self.conv1(torch.cat(rows)).relu()


@block
def ranged(self, features):
    start, step = 1, len(features) // 2
    for i in range(step):
        start = start + i
    return self.conv1(features[start + step]).relu()


@pytest.mark.parametrize("kind", [numbered, top_down, counted, offset, ranged])
def test_plan_gives_no_false_alarm_of_sums_that_are_not_residual(kind: type[Block]) -> None:
    planned = plan(nn.Sequential(kind(), basic()))
    assert [i.path for i in planned] == ["1.conv2"]
    assert planned.unanalysed == ()


@block
def of_the_image(self, x):
    return x + self.conv2(self.body(self.conv1(x)))


@block
def of_the_stream(self, x):
    x = self.conv1(x)
    return self.norm(x + self.conv2(self.body(x)))


@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_tells_the_stream_of_a_network_from_its_image(example: Tensor | None) -> None:
    parts = {"body": nn.Sequential(basic(), basic()), "norm": nn.BatchNorm2d(8)}
    blocks = ["body.0.conv2", "body.1.conv2"]
    assert sorted(host_paths(of_the_image(**parts), example)) == blocks
    assert sorted(host_paths(of_the_stream(**parts), example)) == [*blocks, "conv2"]


@block
def masked(self, x, mask):
    return x + self.conv2(self.conv1(x * mask).relu() * mask)


@block
def blended(self, x, other):
    weight = other.mean(1, keepdim=True)
    return self.branch(x * weight) * weight + other * (1 - weight)


def test_rule_counts_a_masked_branch_but_no_blend() -> None:
    example = (MAP, MAP)
    assert host_paths(nn.ModuleList([masked()])) == ["0.conv2"]
    assert host_paths(masked(), example) == ["conv2"]
    for given in (None, example):
        with pytest.raises(ValueError, match=r"^found no place for SimAM"):
            plan(blended(), example=given)


class Stage(nn.Module):
    """A class that adds in one form, and holds blocks in the other."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.body = nn.Sequential(conv(), nn.ReLU(), conv()) if adds else Scaled()
        self.down = conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.down(self.body(x).relu())


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True).relu()


@pytest.mark.parametrize("example", [None, MAP], ids=["traced", "example"])
def test_rule_takes_no_stage_for_a_block_without_skip(example: Tensor | None) -> None:
    net = nn.Sequential(Stage(adds=True), Stage(adds=False))
    assert host_paths(net, example) == ["0.body.2"]
