"""What the tests with real tools share."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

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
