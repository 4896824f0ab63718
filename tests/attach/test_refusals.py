"""attach and detach: their errors and warnings, and that an error changes nothing."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from simam import attach, detach
from tests.helpers.tiny_blocks import attached, basic, block, conv, snapshot


@block
def untraceable(self, x):
    return x + self.branch(x[: int(x.sum())])


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(8), basic(), basic())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_lambda": 0.0}, "e_lambda must be a positive, finite number, got 0.0"),
        ({"e_lambda": "0.1"}, "e_lambda must be a number, got '0.1'"),
        ({"statistics": "exact"}, "statistics must be 'shared' or 'leave_one_out', got 'exact'"),
        ({"where": "features.*"}, "where='features.*' matches none of the model's modules"),
        ({"exclude": "features.*"}, "exclude='features.*' matches none of the planned insertions"),
    ],
)
def test_attach_error_leaves_the_model_unchanged(
    net: nn.Module, options: dict[str, object], message: str
) -> None:
    before = snapshot(net)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        attach(net, **options)
    assert snapshot(net) == before


def test_attach_error_leaves_the_options_unchanged(net: nn.Module) -> None:
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
        (lazy, "LazyConv2d is lazy and not yet initialised; run the model once first"),
        (scripted, "RecursiveScriptModule is a TorchScript module; attach before scripting"),
        (with_own_simam, "Conv2d already has an attribute 'simam' of its own; rename it"),
    ],
)
def test_attach_refuses_a_convolution(
    net: nn.Module, change: Callable[[nn.Conv2d], nn.Module], problem: str
) -> None:
    net.append(change(conv()))
    before = snapshot(net)
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'cannot attach SimAM to 4: this {problem}')}$"
    ):
        attach(net, where="*")
    assert snapshot(net) == before


@pytest.mark.parametrize("function", [attach, detach])
def test_attach_and_detach_refuse_other_objects_than_modules(
    function: Callable[[object], object],
) -> None:
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got str$"):
        function("resnet18")


def test_detach_refuses_a_convolution_parametrized_later(net: nn.Module) -> None:
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


def test_attach_warns_of_an_unanalysed_block(net: nn.Module) -> None:
    net.append(untraceable())
    message = (
        r"^left without SimAM, because they could not be analysed: 4 \(untraceable, .*Proxy.*\)\. "
        r"Give an example of the model's input to analyse such blocks by what they do: .*\. "
        r"Choose hosts with where=, or name the blocks in exclude= to accept this\.$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        attach(net)
    assert [warning.filename for warning in caught] == [__file__]
    assert attached(net).keys() == {"2.conv2.simam", "3.conv2.simam"}


@pytest.mark.parametrize("options", [{"exclude": "4"}, {"where": "*.conv2"}])
def test_attach_exclude_accepts_an_unanalysed_block(net: nn.Module, options: dict) -> None:
    net.append(untraceable())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net, **options)
    assert attached(net).keys() >= {"2.conv2.simam", "3.conv2.simam"}
