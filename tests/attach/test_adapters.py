"""attach with adapters of convolutions, by a small imitation of peft.

An adapter adds its part to the output of its base layer. Merged, it adds it to the weight, and so
before SimAM; unmerged, it must be before SimAM, too. tests/borders has the same with peft itself.
"""

import copy
import pickle
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import simam
from simam import attach, detach, plan
from tests.helpers.tiny_blocks import basic, conv, snapshot


class Adapter(nn.Module):
    """A pair of small convolutions beside a convolution."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        kind, (channels, inputs) = type(base), base.weight.shape[:2]
        padding = {"padding": base.padding, "bias": False}
        self.down = nn.ModuleDict({"default": kind(inputs, 2, base.kernel_size, **padding)})
        self.up = nn.ModuleDict({"default": kind(2, channels, 1, bias=False)})
        self.is_merged = False

    def get_base_layer(self) -> nn.Module:
        base = self
        while hasattr(base, "base_layer"):
            base = base.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer().weight

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        return base if self.is_merged else base + self.up["default"](self.down["default"](x))

    def merge(self) -> None:
        up, down = self.up["default"].weight, self.down["default"].weight
        base = self.get_base_layer()
        base.weight.data += torch.einsum("or...,ri...->oi...", up, down)
        self.is_merged = True


class Tuner:
    """Wraps chosen convolutions of a model, in place, and unwraps them."""

    def __init__(self, model: nn.Module, ending: str) -> None:
        self.model = model
        for parent, name in [*self.children(lambda path, _: path.endswith(ending))]:
            setattr(parent, name, Adapter(getattr(parent, name)))

    def children(self, select: object) -> Iterator[tuple[nn.Module, str]]:
        for path, module in list(self.model.named_modules()):
            if select(path, module):
                parent, _, name = path.rpartition(".")
                yield self.model.get_submodule(parent), name

    def unload(self, merge: bool) -> nn.Module:
        return self._unload_and_optionally_merge(merge)

    def _unload_and_optionally_merge(self, merge: bool) -> nn.Module:
        for parent, name in [*self.children(lambda path, module: isinstance(module, Adapter))]:
            target = getattr(parent, name)
            if merge:
                target.merge()
            setattr(parent, name, target.get_base_layer())
        return self.model


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(basic(), basic(norm=nn.BatchNorm2d(8))).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def test_plan_counts_an_adapter_as_its_convolution(net: nn.Module) -> None:
    plain = plan(net)
    Tuner(net, "conv2")
    found = plan(net)
    assert [(i.path, i.block, i.reason) for i in found] == [
        (i.path, i.block, i.reason) for i in plain
    ]
    assert {i.host for i in found} == {"Conv2d 3x3 with its adapter"}
    Tuner(net, "conv1")
    assert plan(net) == found


def test_attach_puts_simam_behind_the_adapter(net: nn.Module, x: Tensor) -> None:
    tuner = Tuner(net, "conv2")
    with torch.no_grad():
        expected = simam.functional.simam(net[0].conv2(x), 0.1)
        attach(net, e_lambda=0.1)
        assert simam.attached(net).keys() == {"0.conv2", "1.conv2"}
        assert torch.equal(net[0].conv2(x), expected)
        unmerged = net(x)
        for model in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(model(x), unmerged)
        for _, adapter in filter(lambda item: isinstance(item[1], Adapter), net.named_modules()):
            adapter.merge()
        torch.testing.assert_close(net(x), unmerged, rtol=1e-5, atol=1e-5)
    assert tuner.model is net


def test_merged_and_unloaded_convolutions_keep_simam(net: nn.Module, x: Tensor) -> None:
    tuner = Tuner(net, "conv2")
    attach(net, e_lambda=0.1)
    layers, adapter = simam.attached(net), net[0].conv2
    with torch.no_grad():
        expected = net(x)
        tuner.unload(merge=True)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert simam.attached(net) == layers
    assert isinstance(net[0].conv2, nn.Conv2d)
    assert type(adapter) is Adapter
    assert adapter.get_base_layer().weight is adapter.weight
    assert [type(detach(net)[i].conv2) for i in (0, 1)] == [nn.Conv2d, nn.Conv2d]


def test_unloaded_convolutions_keep_simam(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = attach(copy.deepcopy(net))(x)
        tuner = Tuner(net, "conv2")
        attach(net)
        assert torch.equal(tuner.unload(merge=False)(x), expected)


def test_adapters_elsewhere_leave_hosts_alone(net: nn.Module, x: Tensor) -> None:
    attach(net)
    tuner = Tuner(net, "conv1")
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(tuner.unload(merge=True)(x), expected, rtol=1e-5, atol=1e-5)
    assert simam.attached(net).keys() == {"0.conv2", "1.conv2"}


MESSAGE = (
    "cannot adapt this {}: SimAM is attached to it, so that an adapter would act behind SimAM, but "
    "before it once it is merged. The layer has not been changed. Adapt first and attach then: "
    "simam.detach(model), get_peft_model(model, config), simam.attach(model)"
)


def test_attached_convolution_refuses_an_adapter(net: nn.Module, x: Tensor) -> None:
    before = snapshot(attach(net))
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE.format('Conv2d'))}$"):
        Tuner(net, "conv2")
    assert snapshot(net) == before
    detach(net)
    Tuner(net, "conv2")
    assert simam.attached(attach(net)).keys() == {"0.conv2", "1.conv2"}


def test_attached_adapter_refuses_another_adapter(net: nn.Module) -> None:
    Tuner(net, "conv2")
    before = snapshot(attach(net))
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE.format('Adapter'))}$"):
        Adapter(net[0].conv2)
    assert snapshot(net) == before
    detach(net)
    net[0].conv2 = Adapter(net[0].conv2)
    assert simam.attached(attach(net)).keys() == {"0.conv2", "1.conv2"}


def test_detach_restores_the_adapter(net: nn.Module, x: Tensor) -> None:
    Tuner(net, "conv2")
    with torch.no_grad():
        expected = net(x)
        classes = [type(module) for module in net.modules()]
        detach(attach(attach(net), e_lambda=0.1))
        assert torch.equal(net(x), expected)
    assert [type(module) for module in net.modules()] == classes


def test_plan_where_names_the_adapter_and_none_of_its_parts(net: nn.Module) -> None:
    Tuner(net, "conv2")
    every = ["0.conv1", "0.conv2", "1.conv1", "1.conv2"]
    assert [i.path for i in plan(net, where="*")] == every
    with pytest.raises(ValueError, match=r"^where='0\.conv2\.base_layer' matches none of"):
        plan(net, where="0.conv2.base_layer")


def test_attached_convolution_named_base_layer_is_no_adapted_one(x: Tensor) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) * self.base_layer.weight.mean()

    net = nn.Sequential(Stem())
    attach(net, where="*")
    assert simam.attached(net).keys() == {"0.base_layer"}
    assert net(x).shape == x.shape


@pytest.mark.parametrize("example", [None, torch.zeros(1, 8, 8, 8)], ids=["traced", "example"])
def test_plan_gives_no_false_alarm_of_the_layers_in_an_adapter(example: Tensor | None) -> None:
    net = nn.Sequential(basic(), basic())
    Tuner(net, "conv2")
    Tuner(net, "base_layer")  # an adapter of an adapter
    planned = plan(net, example=example)
    assert [insertion.path for insertion in planned] == ["0.conv2", "1.conv2"]
    assert planned.unanalysed == ()
