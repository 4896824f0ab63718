"""What the tests with real tools share."""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.by_hand import ByHand

TOLERANCE = 1e-4
# Networks without SimAM differ by this and more.
NOTICEABLE = 5e-3


def needs(*modules: str) -> list[pytest.MarkDecorator]:
    """Marks for the tests with a tool, which a file assigns to `pytestmark`.

    Nothing is imported. The warnings of tools are their own.
    """
    missing = [module for module in modules if find_spec(module) is None]
    return [
        pytest.mark.borders,
        pytest.mark.filterwarnings("ignore"),
        pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    ]


def tool(distribution: str) -> str:
    """The name and the version of a tool."""
    return f"{distribution} {version(distribution)}"


@torch.no_grad()
def train_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every batch norm what training gives it: statistics of images, and its own affine map.

    The statistics of a fresh norm are 0 and 1, and folding them is trivial.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
    model.train()
    for _ in range(4):
        model(images)
    return model.eval()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def compare(actual: Tensor, expected: Tensor, plain: Tensor) -> dict[str, float]:
    """Check an output against the right one; return what the fixture `record` takes.

    The output of the plain network must differ, or the check would not notice a missing SimAM.
    """
    difference = relative_difference(actual, expected)
    without = relative_difference(plain, expected)
    assert difference < TOLERANCE
    assert without > NOTICEABLE
    return {"difference": difference, "without": without}


def compare_by_hand(
    net: nn.Module,
    plain: nn.Module,
    hosts: Iterable[str],
    run: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    e_lambda: float = 0.1,
) -> dict[str, float]:
    """Check a network with SimAM against the plain one with the formula at its hosts, in float64.

    Outputs are compared, and the gradients of the input and of every parameter.

    Args:
        net (nn.Module): with SimAM, in eval mode.
        plain (nn.Module): the network built without SimAM; it gets the weights of `net`.
        hosts (iterable of str): the modules of `plain` whose output passes through the formula.
        run (callable): from a network and x to an output.
        x (Tensor): the input.
        e_lambda (float): the regulariser.

    Returns:
        dict[str, float]: what the fixture `record` takes.
    """
    net.double()
    plain.double()
    plain.eval()  # some libraries return nothing
    plain.load_state_dict(net.state_dict())
    x = x.double()
    actual, gradients = _outputs_and_gradients(net, run, x)
    without, gradients_without = _outputs_and_gradients(plain, run, x)
    formula = ByHand(nn.Identity(), e_lambda)
    for host in hosts:
        plain.get_submodule(host).register_forward_hook(lambda _, __, output: formula(output))
    expected, expected_gradients = _outputs_and_gradients(plain, run, x)
    assert gradients.keys() == expected_gradients.keys()
    compare(gradients["x"], expected_gradients["x"], gradients_without["x"])
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-9 * largest, name
    return compare(actual, expected, without)


def _outputs_and_gradients(
    net: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    output = run(net, x)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    inputs = {"x": x} | {n: p for n, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(output, inputs.values(), cotangent, allow_unused=True)
    given = {n: g for n, g in zip(inputs, gradients, strict=True) if g is not None}
    return output.detach(), given
