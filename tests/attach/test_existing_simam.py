"""plan and attach on networks that have SimAM already: no block gets a second one unasked."""

import re
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import simam
from simam import ExistingSimAM, SimAM, attach, detach, plan
from tests.helpers.tiny_blocks import attached, basic, block, conv, host_paths, snapshot


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid((x - x.mean((2, 3), keepdim=True)) ** 2)


class Simam_module(Gate):  # noqa: N801 - as it is spelled in many copies
    pass


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = SimAM()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if int(x.sum()) else x


class OwnSimAM(SimAM):
    pass


def simam_function(x: Tensor) -> Tensor:
    return x * torch.sigmoid((x - x.mean((2, 3), keepdim=True)) ** 2)


@block
def attended(self, x):
    return (x + self.att(self.branch(x))).relu()


@block
def attended_behind_the_sum(self, x):
    return self.att(x + self.branch(x))


@block
def attended_before_the_branch(self, x):
    x = self.att(x)
    return x + self.branch(x)


@block
def attended_in_training(self, x):
    y = self.branch(x)
    return x + (self.att(y) if self.training else y)


@block
def with_a_method(self, x):
    return x + self.simam(self.branch(x))


with_a_method.simam = lambda self, x: simam_function(x)


@block
def with_a_function(self, x):
    return x + simam_function(self.branch(x))


@block
def with_the_functional(self, x):
    return x + simam.functional.simam(self.branch(x), 0.1)


@block
def with_an_attribute(self, x):
    return x + self.simam(self.branch(x))


CERTAIN = [
    (basic(conv2=nn.Sequential(conv(), SimAM())), "0.conv2.1"),
    (attended(att=SimAM()), "0.att"),
    (attended(att=partial(SimAM, 8, e_lambda=0.1)()), "0.att"),
    (attended(att=nn.Sequential(nn.Identity(), SimAM())), "0.att.1"),
    (attended(att=OwnSimAM()), "0.att"),
    (attended_behind_the_sum(att=SimAM()), "0.att"),
    (attended_before_the_branch(att=SimAM()), "0.att"),
    (attended_in_training(att=SimAM()), "0.att"),
    (attended(att=Untraceable()), "0.att.layer"),
    (with_an_attribute(simam=SimAM()), "0.simam"),
]
BY_NAME = [
    (attended(att=Simam_module()), "0.att", "the name of its class, Simam_module"),
    (with_an_attribute(simam=Gate()), "0.simam", "its name"),
    (with_a_method(), "0", "the name simam in its code"),
    (with_a_function(), "0", "the name simam_function in its code"),
    (with_the_functional(), "0", "the name simam in its code"),
]


@pytest.mark.parametrize(("first", "path"), CERTAIN)
def test_plan_skips_a_block_that_holds_simam(first: nn.Module, path: str) -> None:
    found = plan(nn.Sequential(first, basic()))
    assert [i.path for i in found] == ["1.conv2"]
    (existing,) = found.existing
    assert existing == ExistingSimAM("0", path, "is a SimAM layer")
    title = "\n\nWith SimAM already, so without a second:\n"
    assert str(found).endswith(f"{title}  0  {path} is a SimAM layer")


@pytest.mark.parametrize(("first", "path", "name"), BY_NAME)
def test_plan_skips_a_block_that_seems_to_hold_simam(
    first: nn.Module, path: str, name: str
) -> None:
    found = plan(nn.Sequential(first, basic()))
    assert [i.path for i in found] == ["1.conv2"]
    assert found.existing == (ExistingSimAM("0", path, f"is taken for SimAM by {name}"),)


def test_plan_names_simam_that_several_blocks_share() -> None:
    layer = SimAM()
    found = plan(nn.Sequential(attended(att=layer), attended(att=layer), basic()))
    assert [i.path for i in found] == ["2.conv2"]
    assert [e.path for e in found.existing] == ["0.att", "1.att"]


@block
def with_a_switch(self, x):
    y = self.branch(x)
    if self.simam is not None:
        y = self.simam(y)
    return x + y


def switched_off() -> nn.Module:
    net = with_a_switch()
    net.simam = None
    return net


@block
def backbone(self, x):
    x = self.att(self.stem(x).relu())
    x = x + self.branch(x)
    return self.att(self.stem(x))


@pytest.mark.parametrize(
    "first",
    [
        with_an_attribute(simam=nn.Identity()),
        switched_off(),
        backbone(stem=conv(), att=SimAM()),
        backbone(stem=conv(), att=Simam_module()),
        backbone(stem=conv(), att=Untraceable()),
        nn.Sequential(conv(), SimAM(), basic(), SimAM()),
        nn.ModuleDict({"simam_stage": basic()}),
    ],
    ids=["identity", "none", "outside", "copy", "untraceable", "between blocks", "container"],
)
def test_plan_keeps_a_block_without_simam(first: nn.Module) -> None:
    net = nn.Sequential(first)
    found = plan(net)
    assert len(found) == 1
    assert found.existing == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net)


@block
def group(self, x):
    return x + self.end(self.body(x))


def test_plan_skips_only_the_inner_block_that_holds_simam() -> None:
    body = nn.Sequential(basic(), attended(att=SimAM()))
    assert host_paths(group(body=body, end=conv())) == ["body.0.conv2", "end"]
    # Without a convolution of its own, the outer branch ends with that of the inner block.
    assert host_paths(group(body=body, end=nn.Identity())) == ["body.0.conv2"]


@pytest.mark.parametrize("place", ["norm", "branch"])
def test_plan_skips_a_block_that_holds_simam_at_every_place(place: str) -> None:
    normed = [nn.Sequential(conv(), nn.BatchNorm2d(8)) for _ in range(2)]
    net = nn.Sequential(basic(conv2=normed[0]), attended(conv2=normed[1], att=SimAM()))
    found = plan(net, place=place)
    assert [i.path for i in found] == ["0.conv2.1"]
    assert [e.path for e in found.existing] == ["1.att"]


def test_attach_warns_of_simam_that_is_there_already() -> None:
    net = nn.Sequential(attended(att=SimAM()), basic(), attended(att=Simam_module()))
    before = snapshot(net[0]), snapshot(net[2])
    message = (
        "left without a second SimAM: 0 (0.att is a SimAM layer), "
        "2 (2.att is taken for SimAM by the name of its class, Simam_module). "
        "Choose hosts with where= to insert one all the same, or name the blocks in exclude= to "
        "accept this."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        attach(net)
    assert [warning.filename for warning in caught] == [__file__]
    assert (snapshot(net[0]), snapshot(net[2])) == before
    assert attached(net).keys() == {"0.att", "1.conv2.simam"}


def test_attach_exclude_accepts_simam_that_is_there_already() -> None:
    net = nn.Sequential(attended(att=SimAM()), basic())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net, exclude="0")
    assert attached(net).keys() == {"0.att", "1.conv2.simam"}


def test_attach_refuses_a_network_that_has_simam_everywhere() -> None:
    net = nn.Sequential(*(attended(att=SimAM()) for _ in range(4)))
    before = snapshot(net)
    message = (
        "this Sequential has SimAM already, and no place is left: 0 (0.att is a SimAM layer), "
        "1 (1.att is a SimAM layer), 2 (2.att is a SimAM layer), and 1 more. "
        "To attach SimAM instead, replace these layers by nn.Identity() first. "
        "To insert a second one all the same, choose hosts with where=."
    )
    for verb in (plan, attach):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            verb(net)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("first", "where", "message"),
    [
        (attended(att=SimAM()), "0.conv2", "0.conv2 (0.att is a SimAM layer)"),
        (attended(att=SimAM()), "0", "0 (0.att is a SimAM layer)"),
        (nn.Sequential(conv(), SimAM()), "0.0", "0.0 (0.1 is a SimAM layer)"),
        (nn.Sequential(conv(), nn.ReLU(), Simam_module()), "0.0", "0.0 (0.2 is taken for SimAM"),
        (with_a_method(), "0.conv1", "0.conv1 (0 is taken for SimAM by the name simam in"),
    ],
)
def test_attach_where_warns_of_a_second_simam(first: nn.Module, where: str, message: str) -> None:
    net = nn.Sequential(first)
    text = "selected by where=, though SimAM is there already: "
    with pytest.warns(UserWarning, match=f"^{re.escape(text + message)}") as caught:
        attach(net, where=where)
    assert [warning.filename for warning in caught] == [__file__]
    assert f"{where}.simam" in attached(net)
    detach(net)


def test_attach_where_is_silent_about_simam_elsewhere() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(), SimAM(), attended(att=SimAM()), basic())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net, where=["0", "5.conv1"])
    assert plan(net, where="0").existing == ()


@pytest.mark.parametrize("place", ["conv", "norm", "branch"])
def test_attach_twice_does_not_take_its_own_layers_for_existing_ones(place: str) -> None:
    net = nn.Sequential(basic(conv2=nn.Sequential(conv(), nn.BatchNorm2d(8))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = plan(net, place=place)
        attach(attach(net, place=place), place=place, e_lambda=0.1)
        assert plan(net, place=place) == before
        assert plan(net, place=place).existing == ()
        attach(net, where=before[0].path)
    assert len(attached(net)) == 1


@pytest.mark.parametrize("attn_layer", [SimAM, partial(SimAM, e_lambda=0.1)])
def test_attach_refuses_timm_networks_with_simam(attn_layer: Callable[..., nn.Module]) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model("resnet18", block_args={"attn_layer": attn_layer})
    message = "this ResNet has SimAM already, and no place is left: layer1.0 (layer1.0.se is a"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        attach(net)
