"""attach and detach: what they change, what they refuse, and that they leave no trace."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from tiny_blocks import Block, basic, block, conv
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import simam
from simam import SimAM, attach, detach


@block
def untraceable(self, x):
    return x + self.branch(x[: int(x.sum())])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(), nn.BatchNorm2d(8), basic(), basic(norm=nn.BatchNorm2d(8)))
    layers[0].register_forward_hook(lambda module, args, output: None)
    layers[2].register_buffer("steps", torch.zeros(3), persistent=False)
    layers[2].conv1.weight.requires_grad_(False)
    layers[3].eval()
    return layers


def snapshot(model: nn.Module) -> object:
    """All that a model's modules hold: attributes in order, tensors by identity and version."""

    def fingerprint(value: object) -> object:
        if isinstance(value, Tensor):
            return id(value), value._version, value.requires_grad
        if isinstance(value, dict):
            return [(key, fingerprint(item)) for key, item in value.items()]
        return id(value) if isinstance(value, nn.Module) else value

    return [(p, type(m), fingerprint(vars(m))) for p, m in model.named_modules()]


def attached(model: nn.Module) -> dict[str, SimAM]:
    return {path: m for path, m in model.named_modules() if isinstance(m, SimAM)}


def test_the_layer_is_a_child_of_the_convolution(net: nn.Module) -> None:
    assert attach(net, e_lambda=0.1, statistics="leave_one_out") is net
    assert attached(net).keys() == {"2.conv2.simam", "3.conv2.simam"}
    assert {repr(layer) for layer in attached(net).values()} == {
        "SimAM(e_lambda=0.1, statistics='leave_one_out')"
    }
    assert isinstance(net[2].conv2, nn.Conv2d)
    assert type(net[2].conv1) is nn.Conv2d


def test_the_layer_sees_the_output_of_the_convolution(net: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    expected = simam.functional.simam(net[2].conv2(x), 0.1)
    attach(net, e_lambda=0.1)
    assert torch.equal(net[2].conv2(x), expected)
    assert torch.equal(net[2].conv2(input=x), expected)


def test_names_of_the_state_are_unchanged(net: nn.Module) -> None:
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


def test_detach_leaves_layers_that_are_not_of_attach(net: nn.Module) -> None:
    net.append(SimAM())
    net[0].simam = SimAM()
    before = snapshot(net)
    assert snapshot(detach(attach(net))) == before


def test_attaching_again_sets_the_options_and_never_nests(net: nn.Module) -> None:
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


def test_the_layer_has_the_mode_of_its_convolution(net: nn.Module) -> None:
    attach(net)
    assert [layer.training for layer in attached(net).values()] == [True, False]
    net.eval()
    assert not any(layer.training for layer in attached(net).values())


def test_a_module_that_appears_twice_is_changed_once() -> None:
    shared = basic()
    twice = nn.Sequential(shared, nn.Sequential(shared))
    before = snapshot(twice)
    attach(twice)
    assert attached(twice).keys() == {"0.conv2.simam"}
    assert snapshot(detach(twice)) == before


def test_a_convolution_that_two_blocks_share_is_changed_once() -> None:
    first = basic()
    net = nn.Sequential(first, basic(conv2=first.conv2))
    before = snapshot(net)
    attach(net)
    assert attached(net).keys() == {"0.conv2.simam"}
    assert type(net[1].conv2) is type(net[0].conv2)
    assert snapshot(detach(net)) == before


def test_the_forward_of_a_subclass_keeps_its_arguments() -> None:
    class Masked(nn.Conv2d):
        def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x * mask)

    layer = Masked(3, 4, 3)
    x, mask = torch.randn(2, 2, 3, 6, 6)
    expected = SimAM()(layer(x, mask, scale=2.0))
    attach(layer, where="")
    assert type(layer).__name__ == "SimAMMasked"
    assert torch.equal(layer(x, mask=mask, scale=2.0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_lambda": 0}, "e_lambda must be a positive, finite number, got 0.0"),
        ({"e_lambda": "0.1"}, "e_lambda must be a number, got '0.1'"),
        ({"statistics": "exact"}, "statistics must be 'shared' or 'leave_one_out', got 'exact'"),
        ({"where": "features.*"}, "where='features.*' matches none of the model's convolutions"),
        ({"exclude": "features.*"}, "exclude='features.*' matches none of the planned places"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(
    net: nn.Module, options: dict[str, object], message: str
) -> None:
    before = snapshot(net)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        attach(net, **options)
    assert snapshot(net) == before


def test_an_error_leaves_the_options_as_they_were(net: nn.Module) -> None:
    before = snapshot(attach(net, e_lambda=0.1))
    with pytest.raises(ValueError, match="matches none"):
        attach(net, where=["2.conv2", "4.*"])
    assert snapshot(net) == before


def spectral_norm(layer: nn.Conv2d) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def lazy(layer: nn.Conv2d) -> nn.Module:
    return nn.LazyConv2d(8, 3)


def scripted(layer: nn.Conv2d) -> nn.Module:
    return torch.jit.script(layer)


def with_own_simam(layer: nn.Conv2d) -> nn.Module:
    layer.simam = nn.Identity()
    return layer


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            spectral_norm,
            "ParametrizedConv2d is parametrized; attach before torch.nn.utils.parametrize, or "
            "remove it first",
        ),
        (lazy, "LazyConv2d is lazy and not yet initialised; run the model once before"),
        (scripted, "RecursiveScriptModule is a TorchScript module; attach before scripting"),
        (with_own_simam, "Conv2d already has an attribute 'simam' of its own; rename it"),
    ],
)
def test_refuses_a_convolution(
    net: nn.Module, change: Callable[[nn.Conv2d], nn.Module], problem: str
) -> None:
    net.append(change(conv()))
    before = snapshot(net)
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'cannot attach SimAM to 4: this {problem}')}$"
    ):
        attach(net, where="*")
    assert snapshot(net) == before


def test_detach_refuses_a_convolution_parametrized_since(net: nn.Module) -> None:
    before = snapshot(net)
    attach(net)
    parametrizations.weight_norm(net[3].conv2)
    parametrized = snapshot(net)
    message = (
        "3.conv2 has become a ParametrizedSimAMConv2d since SimAM was attached; "
        "undo that first, for example with torch.nn.utils.parametrize"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        detach(net)
    assert snapshot(net) == parametrized
    parametrize.remove_parametrizations(net[3].conv2, "weight")
    detach(net)
    assert [(path, kind) for path, kind, _ in snapshot(net)] == [
        (path, kind) for path, kind, _ in before
    ]


def test_warns_of_a_block_that_could_not_be_analysed(net: nn.Module) -> None:
    net.append(untraceable())
    message = (
        r"^could not analyse, so left without SimAM: 4: untraceable, .*Proxy.*\. "
        r"Choose convolutions with where=, or name the blocks in exclude= to accept this\.$"
    )
    with pytest.warns(UserWarning, match=message):
        attach(net)
    assert attached(net).keys() == {"2.conv2.simam", "3.conv2.simam"}


@pytest.mark.parametrize("options", [{"exclude": "4"}, {"where": "*.conv2"}])
def test_accepts_a_block_that_could_not_be_analysed(net: nn.Module, options: dict) -> None:
    net.append(untraceable())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net, **options)
    assert attached(net).keys() >= {"2.conv2.simam", "3.conv2.simam"}
