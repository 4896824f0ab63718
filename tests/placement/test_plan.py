"""plan: the hosts it selects, the table it prints, and that it changes nothing."""

import re
import threading

import pytest
import torch
from torch import nn

from simam import Insertion, Plan, SimAM, attach, plan
from tests.helpers.tiny_blocks import basic, block, conv, host_paths, snapshot

HINT = (
    "Give an example of the model's input to analyse such blocks by what they do: "
    "example=torch.zeros(1, 3, 224, 224). It passes through the model once, without computing "
    "anything"
)


@block
def untraceable(self, x):
    return x + self.branch(x[: int(x.sum())])


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(conv(), basic(), nn.ModuleDict({"a": basic(), "b": conv(1)}))


EVERY = ["0", "1.conv1", "1.conv2", "2.a.conv1", "2.a.conv2", "2.b"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("0", ["0"]),
        ("*", EVERY),
        ("2.?", ["2.b"]),
        ("*.conv[12]", ["1.conv1", "1.conv2", "2.a.conv1", "2.a.conv2"]),
        (["2.*", "1.conv2", "1.*2"], ["1.conv2", "2.a.conv1", "2.a.conv2", "2.b"]),
        ({"2.b"}, ["2.b"]),
        (iter(["2.b", "0"]), ["0", "2.b"]),
        (lambda path, module: module.kernel_size == (1, 1), ["2.b"]),
        (lambda path, module: path.endswith("conv2"), ["1.conv2", "2.a.conv2"]),
    ],
)
def test_plan_where_replaces_the_analysis(
    net: nn.Module, where: object, expected: list[str]
) -> None:
    found = plan(net, where=where)
    assert [i.path for i in found] == expected
    assert {i.reason for i in found} == {"selected by where="}


@pytest.mark.parametrize(
    "exclude", ["2.*", ["2.a.conv2"], lambda path, module: path.startswith("2")]
)
def test_plan_exclude_narrows_the_analysis(net: nn.Module, exclude: object) -> None:
    assert [i.path for i in plan(net, exclude=exclude)] == ["1.conv2"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("1", ["1"]),
        ("*.act", ["1.act"]),
        (["*.act", "*.conv2"], ["1.conv2", "1.act"]),
        (lambda path, module: isinstance(module, nn.BatchNorm2d), ["0"]),
    ],
)
def test_plan_where_names_any_module(where: object, expected: list[str]) -> None:
    net = nn.Sequential(nn.BatchNorm2d(8), basic(act=nn.ReLU()))
    assert [i.path for i in plan(net, where=where)] == expected


def test_plan_exclude_narrows_where(net: nn.Module) -> None:
    found = plan(net, where="1.*", exclude="*2")
    assert [i.path for i in found] == ["1.conv1"]


def nothing(path: str, module: nn.Module) -> bool:
    return False


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"where": "1.conv3"},
            "where='1.conv3' matches none of the model's modules; close to it: 1.conv",
        ),
        ({"where": "xyz"}, "where='xyz' matches none of the model's modules"),
        ({"where": ["0", "9"]}, "where='9' matches none of the model's modules"),
        ({"where": "1", "place": "norm"}, "where= names the hosts, so place='norm' has no meaning"),
        ({"place": "bn"}, "place must be one of 'conv', 'norm', 'branch', got 'bn'"),
        ({"where": []}, "where=[] selects none of the model's modules"),
        ({"exclude": "0"}, "exclude='0' matches none of the planned insertions"),
        ({"exclude": "*"}, "exclude='*' leaves out every insertion; nothing to attach"),
    ],
)
def test_plan_refuses_a_selection_of_nothing(
    net: nn.Module, selection: dict[str, object], message: str
) -> None:
    for verb in (plan, attach):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            verb(net, **selection)


@pytest.mark.parametrize(
    ("argument", "candidates"),
    [("where", "the model's modules"), ("exclude", "the planned insertions")],
)
def test_plan_refuses_a_predicate_that_selects_nothing(
    net: nn.Module, argument: str, candidates: str
) -> None:
    message = f"{argument}={nothing!r} selects none of {candidates}"
    for verb in (plan, attach):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            verb(net, **{argument: nothing})


@pytest.mark.parametrize("argument", ["where", "exclude"])
@pytest.mark.parametrize("selector", [[0], ["0", nn.Conv2d], 3, nn.Conv2d(1, 1, 1)])
def test_plan_refuses_a_selector_of_another_type(
    net: nn.Module, argument: str, selector: object
) -> None:
    message = (
        f"{argument} must be a glob, several globs, or a predicate (path, module) -> bool, got "
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        plan(net, **{argument: selector})


def test_plan_raises_the_error_of_a_predicate(net: nn.Module) -> None:
    with pytest.raises(AttributeError, match="no attribute 'kernel'"):
        attach(net, where=lambda path, module: module.kernel == (3, 3))


def test_plan_refuses_other_objects_than_modules() -> None:
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got str$"):
        plan("resnet18")
    message = "a TorchScript module cannot be changed; plan and attach before scripting"
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan(torch.jit.script(conv()))


def test_plan_refuses_a_model_without_residual_blocks() -> None:
    plain = nn.Sequential(conv(), nn.ReLU(), conv())
    message = (
        "found no place for SimAM in this Sequential: no residual block whose branch holds a "
        "spatial (kernel > 1) convolution and a non-linearity. "
        "Choose hosts with where=, for example where='2'."
    )
    for verb in (plan, attach):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            verb(plain)
    assert not any(isinstance(module, SimAM) for module in plain.modules())


def test_plan_reports_a_block_that_could_not_be_analysed() -> None:
    found = plan(nn.Sequential(basic(), untraceable()))
    (unanalysed,) = found.unanalysed
    assert unanalysed.block == "1"
    assert unanalysed.reason.startswith("untraceable, ")
    assert "Proxy" in unanalysed.reason
    left_out = f"\n\nNot analysed, so without SimAM:\n  1  {unanalysed.reason}\n{HINT}"
    assert str(found).endswith(left_out)


def test_plan_refusal_names_the_first_unanalysed_blocks() -> None:
    reason = r"\(untraceable, TypeError: [^()]*\([^()]*\)[^()]*\)"
    listed = rf"Could not analyse 0 {reason}, 1 {reason}, 2 {reason}, and 2 more"
    message = rf"{listed}\. {re.escape(HINT)}\.$"
    with pytest.raises(ValueError, match=message):
        plan(nn.Sequential(*(untraceable() for _ in range(5))))


def test_plan_reports_a_block_that_cannot_be_copied() -> None:
    net = nn.Sequential(basic(), basic())
    net[0].lock = threading.Lock()
    found = plan(net)
    assert [i.path for i in found] == ["1.conv2"]
    assert [u.block for u in found.unanalysed] == ["0"]


def test_plan_exclude_accepts_an_unanalysed_block() -> None:
    net = nn.Sequential(basic(), untraceable(), basic())
    found = plan(net, exclude="1")
    assert [i.path for i in found] == ["0.conv2", "2.conv2"]
    assert found.unanalysed == ()
    with pytest.raises(ValueError, match=r"^exclude='3' matches none of the planned insertions"):
        plan(net, exclude="3")


def test_plan_is_a_list_that_prints_as_a_table() -> None:
    found = plan(nn.Sequential(basic(), basic(conv2=conv(5))))
    reason = "last spatial convolution of the residual branch of basic"
    assert isinstance(found, Plan)
    assert found == [
        Insertion("0.conv2", "0", "Conv2d 3x3", reason),
        Insertion("1.conv2", "1", "Conv2d 5x5", reason),
    ]
    assert str(found).splitlines() == [
        "path     host        block  reason",
        f"0.conv2  Conv2d 3x3  0      {reason}",
        f"1.conv2  Conv2d 5x5  1      {reason}",
    ]
    assert "\nconv2  Conv2d 3x3  (model)  " in str(plan(basic()))


def test_plan_keeps_the_order_of_the_model() -> None:
    net = nn.ModuleDict({"z": basic(), "a": nn.Sequential(*(basic() for _ in range(11)))})
    assert host_paths(net) == ["z.conv2", *(f"a.{i}.conv2" for i in range(11))]


@pytest.mark.parametrize("options", [{}, {"where": "*.conv1"}, {"exclude": "1.*"}])
def test_plan_of_an_attached_model_equals_plan_of_the_plain_model(
    net: nn.Module, options: dict[str, object]
) -> None:
    before = plan(net, **options)
    assert plan(attach(net, e_lambda=0.1), **options) == before
    assert str(plan(net, **options)) == str(before)


def test_plan_neither_runs_nor_changes_the_model(net: nn.Module) -> None:
    def called(*args: object) -> None:
        raise AssertionError("a hook of the user was called")

    @block
    def inner(self, x):
        return self.branch(x)

    @block
    def counting(self, x):
        self.calls += 1
        self.seen.append(x)
        self.total.add_(1)
        return x + self.inner(x)

    net.append(counting(inner=inner()))
    net[-1].calls, net[-1].seen = 0, []
    net[-1].register_buffer("total", torch.zeros(()))
    for module in net.modules():
        module.register_forward_hook(called)
        module.register_forward_pre_hook(called)
    before, state = snapshot(net), torch.get_rng_state()

    assert host_paths(net) == ["1.conv2", "2.a.conv2", "3.inner.conv2"]
    assert snapshot(net) == before
    assert (net[-1].calls, net[-1].seen) == (0, [])
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.Sequential(basic(), nn.BatchNorm2d(8))
    assert host_paths(net) == ["0.conv2"]


def test_plan_sees_through_wrappers() -> None:
    assert host_paths(nn.DataParallel(nn.Sequential(basic()))) == ["module.0.conv2"]
    assert host_paths(torch.compile(nn.Sequential(basic()))) == ["_orig_mod.0.conv2"]
