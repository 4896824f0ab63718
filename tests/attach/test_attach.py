"""attach and detach: what they change, and that they leave no trace."""

import pytest
import torch
from torch import Tensor, nn

import simam
from simam import SimAM, attach, detach
from tests.helpers.tiny_blocks import attached, basic, conv, snapshot


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(), nn.BatchNorm2d(8), basic(), basic(norm=nn.BatchNorm2d(8)))
    layers[0].register_forward_hook(lambda module, args, output: None)
    layers[2].register_buffer("steps", torch.zeros(3), persistent=False)
    layers[2].conv1.weight.requires_grad_(False)
    layers[3].eval()
    return layers


def test_attach_makes_simam_a_child_of_the_convolution(net: nn.Module) -> None:
    assert attach(net, e_lambda=0.1, statistics="leave_one_out") is net
    assert attached(net).keys() == {"2.conv2.simam", "3.conv2.simam"}
    assert {repr(layer) for layer in attached(net).values()} == {
        "SimAM(e_lambda=0.1, statistics='leave_one_out')"
    }
    assert isinstance(net[2].conv2, nn.Conv2d)
    assert type(net[2].conv1) is nn.Conv2d


def test_attach_passes_the_convolution_output_to_simam(net: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    expected = simam.functional.simam(net[2].conv2(x), 0.1)
    attach(net, e_lambda=0.1)
    assert torch.equal(net[2].conv2(x), expected)
    assert torch.equal(net[2].conv2(input=x), expected)


def test_attach_keeps_state_dict_keys(net: nn.Module) -> None:
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    attach(net)
    assert dict(net.named_parameters()) == parameters
    assert dict(net.named_buffers()) == buffers
    assert list(net.state_dict()) == list(weights)
    assert net.load_state_dict(weights) == ([], [])
    assert detach(net).load_state_dict(weights) == ([], [])


def test_detach_leaves_no_trace(net: nn.Module) -> None:
    before = snapshot(net)
    assert snapshot(attach(net)) != before
    assert detach(net) is net
    assert snapshot(net) == before


def test_detach_of_a_plain_model_changes_nothing(net: nn.Module) -> None:
    before = snapshot(net)
    assert detach(net) is net
    assert snapshot(net) == before


def test_detach_leaves_other_simam_layers(net: nn.Module) -> None:
    net.append(SimAM())
    net[0].simam = SimAM()
    before = snapshot(net)
    assert snapshot(detach(attach(net))) == before


def test_attach_twice_sets_the_options_and_never_nests(net: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    before = snapshot(net.eval())
    once = attach(net, e_lambda=0.5)(x)
    kinds = [type(module) for module in net.modules()]
    attach(net, e_lambda=0.1)
    attach(net, e_lambda=0.5, where="2.conv2")
    assert [type(module) for module in net.modules()] == kinds
    assert [layer.e_lambda for layer in attached(net).values()] == [0.5, 0.1]
    assert torch.equal(attach(net, e_lambda=0.5)(x), once)
    assert snapshot(detach(net)) == before


def test_attach_gives_simam_the_mode_of_its_convolution(net: nn.Module) -> None:
    attach(net)
    assert [layer.training for layer in attached(net).values()] == [True, False]
    net.eval()
    assert not any(layer.training for layer in attached(net).values())


def test_attach_changes_a_repeated_module_once() -> None:
    shared = basic()
    twice = nn.Sequential(shared, nn.Sequential(shared))
    before = snapshot(twice)
    attach(twice)
    assert attached(twice).keys() == {"0.conv2.simam"}
    assert snapshot(detach(twice)) == before


def test_attach_changes_a_shared_convolution_once() -> None:
    first = basic()
    net = nn.Sequential(first, basic(conv2=first.conv2))
    before = snapshot(net)
    attach(net)
    assert attached(net).keys() == {"0.conv2.simam"}
    assert type(net[1].conv2) is type(net[0].conv2)
    assert snapshot(detach(net)) == before


def test_attach_keeps_the_forward_arguments_of_a_subclass() -> None:
    class Masked(nn.Conv2d):
        def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x * mask)

    layer = Masked(3, 4, 3)
    x, mask = torch.randn(2, 2, 3, 6, 6)
    expected = SimAM()(layer(x, mask, scale=2.0))
    attach(layer, where="")
    assert type(layer).__name__ == "SimAMMasked"
    assert torch.equal(layer(x, mask=mask, scale=2.0), expected)
