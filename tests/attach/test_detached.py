"""attached and detached: what a network has, and the plain network for a while."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from simam import SimAM, attach, attached, detach, detached
from tests.helpers.tiny_blocks import basic, conv, snapshot


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return attach(nn.Sequential(conv(), basic(), basic(), nn.Sequential(SimAM())), e_lambda=0.1)


def test_attached_names_the_layers_by_their_hosts(net: nn.Module) -> None:
    layers = attached(net)
    assert layers == {"1.conv2": net[1].conv2.simam, "2.conv2": net[2].conv2.simam}
    assert attached(net[1]) == {"conv2": net[1].conv2.simam}
    assert attached(net[1].conv2) == {"": net[1].conv2.simam}
    assert attached(detach(net)) == {}


def test_attached_notices_a_network_that_was_built_again(net: nn.Module) -> None:
    again = nn.Sequential(conv(), basic(), basic(), nn.Sequential(SimAM()))
    again.load_state_dict(net.state_dict())
    assert len(attached(copy.deepcopy(net))) == 2
    assert not attached(again)


def test_detached_network_is_the_plain_one_and_everything_returns(net: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    calls: list[str] = []
    net[1].conv2.simam.register_forward_hook(lambda *_: calls.append("hook"))
    before, expected = snapshot(net), net(x)
    plain = detach(copy.deepcopy(net))
    with detached(net) as inside:
        assert inside is net
        assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
        assert not attached(net)
        assert torch.equal(net(x), plain(x))
    assert snapshot(net) == before
    assert torch.equal(net(x), expected)
    assert calls == ["hook"] * 2


def test_detached_returns_everything_after_an_error(net: nn.Module) -> None:
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), detached(net):
        net(1 / 0)
    assert snapshot(net) == before


def test_detached_may_be_nested(net: nn.Module) -> None:
    before = snapshot(net)
    with detached(net):
        plain = snapshot(net)
        with detached(net[1]), detached(net):
            assert snapshot(net) == plain
        assert snapshot(net) == plain
    assert snapshot(net) == before


def test_detached_part_leaves_the_rest(net: nn.Module) -> None:
    with detached(net[1]):
        assert attached(net).keys() == {"2.conv2"}
    assert attached(net).keys() == {"1.conv2", "2.conv2"}


def test_detached_layers_return_in_the_mode_of_their_hosts(net: nn.Module) -> None:
    with detached(net):
        net.eval()
    assert not any(module.training for module in net.modules())


def test_detached_layers_replace_those_attached_meanwhile(net: nn.Module) -> None:
    before = snapshot(net)
    with detached(net):
        attach(net, e_lambda=0.5)
    assert snapshot(net) == before


def test_detached_without_simam_changes_nothing() -> None:
    net = nn.Sequential(conv(), SimAM())
    before = snapshot(net)
    with detached(net):
        assert snapshot(net) == before
    assert snapshot(net) == before


def test_detached_names_a_host_that_was_parametrized_meanwhile(net: nn.Module) -> None:
    message = r"^cannot attach SimAM to 1\.conv2: this ParametrizedConv2d is parametrized; "
    with pytest.raises(ValueError, match=message), detached(net):
        parametrizations.weight_norm(net[1].conv2)
    assert attached(net).keys() == {"2.conv2"}


def test_detached_refuses_before_any_change(net: nn.Module) -> None:
    parametrizations.weight_norm(net[2].conv2)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"^2\.conv2 has become a "), detached(net):
        pytest.fail("the block must not run")
    assert snapshot(net) == before
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got str$"), detached("net"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_class_of_a_host_builds_the_plain_class(kind: type[nn.Module]) -> None:
    host = attach(kind(4, 4, 3), where="")
    again = type(host)(4, 6, kernel_size=1)
    assert type(again) is kind
    assert again(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)
