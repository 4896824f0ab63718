"""plan and attach with an example: the blocks are analysed by what they do in one run."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from simam import attach, attached, plan
from tests.helpers.tiny_blocks import Block, basic, block, conv, snapshot

X = torch.zeros(2, 8, 16, 16)


def paths(model: nn.Module, example: object = X) -> list[str]:
    return [insertion.path for insertion in plan(model, example=example)]


@block
def asks_for_the_number_of_arguments(self, x, *args, **kwargs):
    if len(args) > 0 or kwargs.get("scale") is not None:
        raise ValueError("only x")
    return x + self.branch(x)


@block
def loops_over_chunks(self, x):
    y = self.conv1(x).relu()
    parts = [self.conv4(part) for part in y.chunk(2, 1)]
    return x + self.conv2(torch.cat(parts, 1).relu())


@block
def loops_over_a_split(self, x):
    y = self.conv1(x).relu()
    for part in torch.split(y, 4, 1):
        y = y + part.mean(1, keepdim=True)
    return x + self.conv2(y)


@block
def unpacks_as_many_as_there_are(self, x):
    first, *others = x.unbind(1)
    y = torch.stack([first, *others], 1)
    return x + self.branch(y)


@block
def pads_by_a_size(self, x):
    pad = max(0, 3 - int(x.shape[-1]) % 2 - 1)
    y = F.pad(self.conv1(x).relu(), (pad, 0, pad, 0))
    return x + self.conv2(y)[..., pad:, pad:]


@block
def takes_a_float_of_a_size(self, x):
    return x + self.branch(x) * float(x.shape[1]) ** -0.5


@block
def as_a_tensor(self, x):
    return torch.as_tensor(x) + self.branch(x)


@block
def range_over_the_batch(self, x):
    return torch.stack([x[i] + self.branch(x[i : i + 1])[0] for i in range(len(x))])


@block
def sums_by_a_list(self, x):
    ends = [x]
    for layer in (self.conv1, nn.functional.relu, self.conv2):
        ends.append(layer(ends[-1]))
    return ends[0] + ends.pop()


@block
def in_place_on_a_list(self, x):
    state = {"y": self.branch(x)}
    state["y"] += x
    return state["y"]


@torch.jit.script
def scripted_activation(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@block
def scripted(self, x):
    return x + self.conv2(scripted_activation(self.conv1(x)))


@block
def called_as_an_operator(self, x):
    return torch.ops.aten.add.Tensor(x, self.branch(x))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


@block
def by_a_function_of_autograd(self, x):
    return x + self.conv2(Swish.apply(self.conv1(x)))


@block
def through_memory_that_was_empty(self, x):
    y = torch.empty_like(x)
    y[:, :4], y[:, 4:] = self.conv2(self.conv1(x).relu()).chunk(2, 1)
    return x + y


FOUND = [
    asks_for_the_number_of_arguments,
    loops_over_chunks,
    loops_over_a_split,
    unpacks_as_many_as_there_are,
    pads_by_a_size,
    takes_a_float_of_a_size,
    as_a_tensor,
    range_over_the_batch,
    sums_by_a_list,
    in_place_on_a_list,
    scripted,
    called_as_an_operator,
    by_a_function_of_autograd,
    through_memory_that_was_empty,
]


@pytest.mark.parametrize("kind", FOUND)
def test_plan_with_an_example_follows_any_python(kind: type[Block]) -> None:
    parts = {"conv4": nn.Conv2d(4, 4, 1)}
    assert paths(kind(**parts)) == ["conv2"]
    assert paths(nn.Sequential(conv(), kind(**parts), nn.ReLU())) == ["1.conv2"]


@block
def takes_any_options(self, x, *args, scale=1.0, **kwargs):
    return x + scale * self.conv2(self.conv1(x).relu(*args, **kwargs))


@pytest.mark.parametrize("kind", [asks_for_the_number_of_arguments, takes_any_options])
def test_plan_traces_a_block_that_takes_any_further_arguments(kind: type[Block]) -> None:
    assert paths(kind(), None) == ["conv2"]
    assert paths(nn.Sequential(kind(), basic()), None) == ["0.conv2", "1.conv2"]


class Plus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class ProjectedPlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = conv(1)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.proj(y) + x


class PlusByName(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.add(x)


def add_up(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def add_up_by_name(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, alpha=0.5)


@block
def added_by_a_named_function(self, x):
    return add_up_by_name(self.branch(x), x)


@block
def added_by_a_module(self, x):
    return self.plus(self.branch(x), x)


@block
def added_by_a_function(self, x):
    return add_up(self.branch(x), x)


@pytest.mark.parametrize("with_example", [True, False], ids=["example", "traced"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: added_by_a_module(plus=Plus()),
        lambda: added_by_a_module(plus=ProjectedPlus()),
        lambda: added_by_a_module(plus=PlusByName()),
        added_by_a_function,
        added_by_a_named_function,
    ],
    ids=["module", "projection", "module by name", "function", "function by name"],
)
def test_plan_finds_a_sum_in_a_helper(make, with_example) -> None:
    example = X if with_example else None
    assert paths(make(), example) == ["conv2"]
    assert paths(nn.Sequential(make(), basic()), example) == ["0.conv2", "1.conv2"]


def test_plan_takes_an_example_as_arguments_by_position_or_by_name() -> None:
    @block
    def conditioned(self, x, *, time, scale=1.0):
        return x + scale * self.conv2(self.conv1(x).relu() + time.exp())

    net = conditioned()
    for example in ({"x": X, "time": torch.tensor(3.0)}, {"x": X, "time": X, "scale": 2.0}):
        assert paths(net, example) == ["conv2"]

    @block
    def listed(self, images, more):
        return [x + self.branch(x[None])[0] for x in [*images, more["image"]]]

    assert paths(listed(), ([X[0], X[1]], {"image": X[0]})) == ["conv2"]


def test_plan_with_an_example_uses_its_shapes_alone() -> None:
    for example in (X.to("meta"), X.bfloat16(), torch.full_like(X, torch.nan)):
        assert paths(basic().to(example.dtype), example) == ["conv2"]
    assert paths(basic().to("meta"), X) == ["conv2"]


@block
def reads_a_value(self, x):
    if x.mean() > 1:  # true of the example that holds values
        return x + self.branch(x)
    return self.branch(x)


def test_plan_reads_values_of_the_example_if_it_must() -> None:
    assert paths(nn.Sequential(basic(), reads_a_value()), X + 2) == ["0.conv2", "1.conv2"]


def test_plan_says_when_an_example_has_no_values_to_read() -> None:
    @block
    def numeric(self, x):
        return x + self.branch(x) * x.mean().item() if float(x.mean()) > 0 else x

    planned = plan(nn.Sequential(basic(), numeric()), example=X.to("meta"))
    assert [i.path for i in planned] == ["0.conv2"]
    ((path, reason),) = [(u.block, u.reason) for u in planned.unanalysed]
    assert path == "1"
    assert "reads a value" in reason
    assert "on the CPU" in reason


def test_plan_with_an_example_leaves_everything_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = basic()
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.seen: list[Tensor] = []
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x)
            self.count = random.random() + np.random.rand()
            return self.drop(self.norm(self.block(x))) + torch.rand(())

    net = Counting().train()
    net.norm.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    states = snapshot(net), {k: v.clone() for k, v in net.state_dict().items()}
    randoms = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    example = X.clone()
    assert paths(net, example) == ["block.conv2"]
    with pytest.raises(ValueError, match="could not run this Counting on the example"):
        plan(net, example=torch.zeros(1, 3, 8, 8))
    assert snapshot(net) == states[0]
    assert all(torch.equal(v, states[1][k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert (np.random.get_state()[1] == randoms[2]).all()
    assert torch.equal(example, X)
    assert net.training
    assert not hasattr(net, "count")


def test_plan_with_an_example_accepts_a_module_that_belongs_elsewhere() -> None:
    @block
    def given(self, x, act):
        return x + self.conv2(act(self.conv1(x)))

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.block = nn.ReLU(), given()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, self.act)

    assert paths(Owner()) == ["block.conv2"]


@pytest.mark.parametrize(
    "example",
    [[X], "1,8,16,16", 3, X.numpy()],
    ids=["list", "text", "number", "array"],
)
def test_plan_refuses_an_example_of_another_type(example: object) -> None:
    with pytest.raises(TypeError, match=r"^example must be a tensor, a tuple of arguments, or a"):
        plan(basic(), example=example)


def test_plan_refuses_an_example_that_the_model_cannot_take() -> None:
    message = (
        r"^could not run this basic on the example: RuntimeError: .*channels.*\. An example is "
        "what the model takes: a tensor, a tuple of arguments, or a dict of keyword arguments"
    )
    for example in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8, device="meta")):
        with pytest.raises(ValueError, match=message):
            plan(basic(), example=example)
    with pytest.raises(ValueError, match="unexpected keyword argument 'image'"):
        plan(basic(), example={"image": X})


def test_plan_prints_nothing_of_a_run_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(basic(), nn.MaxPool2d(64))
    for example in (X, X.to("meta")):
        with pytest.raises(ValueError, match="Output size is too small"):
            plan(net, example=example)
    assert capfd.readouterr() == ("", "")


def test_plan_names_an_example_where_a_trace_stops() -> None:
    planned = plan(nn.Sequential(basic(), loops_over_a_split()))
    ((path, _reason),) = [(u.block, u.reason) for u in planned.unanalysed]
    assert path == "1"
    assert planned[0].path == "0.conv2"
    assert "example=" in str(planned)
    with pytest.raises(ValueError, match="example="):
        plan(loops_over_a_split())


def test_plan_says_that_a_block_did_not_run_on_the_example() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra = basic(), loops_over_a_split()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    planned = plan(Unused(), example=X)
    assert [i.path for i in planned] == ["body.conv2"]
    (unanalysed,) = planned.unanalysed
    assert unanalysed.block == "extra"
    assert unanalysed.reason.endswith("; it did not run on the example")


def test_plan_analyses_what_did_not_run_without_the_example() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra = basic(), basic()

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(self.body(x)) if self.training else self.body(x)

    assert paths(Heads()) == ["body.conv2", "extra.conv2"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_plan_with_an_example_looks_into_wrappers(wrap) -> None:
    (inner,) = paths(nn.Sequential(basic()))
    (path,) = paths(wrap(nn.Sequential(basic())))
    assert path.removeprefix("module.").removeprefix("_orig_mod.") == inner


def test_plan_with_an_example_accepts_weight_norm() -> None:
    old = basic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(old.conv2)
    assert paths(old) == ["conv2"] == paths(old, None)
    new = basic()
    parametrizations.weight_norm(new.conv2)
    assert paths(new) == ["conv2"]


def test_plan_with_an_example_gives_the_same_after_attach() -> None:
    net = nn.Sequential(basic(), loops_over_a_split())
    planned = plan(net, example=X)
    attach(net, example=X)
    assert list(attached(net)) == [i.path for i in planned] == ["0.conv2", "1.conv2"]
    assert plan(net, example=X) == planned


def test_plan_refuses_an_example_beside_where() -> None:
    with pytest.raises(ValueError, match="where= names the hosts, so example= has no meaning"):
        plan(basic(), where="conv2", example=X)
