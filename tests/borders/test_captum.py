"""Attribution methods of captum that know layers by their class."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simam import attach
from tests.helpers.borders import needs, tool, train_norms

pytestmark = needs("captum", "torchvision")


class Block(nn.Module):
    """A residual block whose layers are each used once, as DeepLift requires."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(channels) for _ in range(2))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(x + branch)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        Block(8),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return train_norms(net, torch.rand(8, 3, 16, 16))


def incompleteness(method: type, net: nn.Module) -> float:
    """How far the attributions of an image are from adding up to the change of the output."""
    x = torch.rand(4, 3, 16, 16)
    zero = torch.zeros_like(x)
    attributions = method(net).attribute(x, zero, target=1)
    change = (net(x) - net(zero))[:, 1]
    return ((attributions.flatten(1).sum(1) - change) / change).abs().max().item()


def test_deep_lift_is_not_complete_with_simam(net: nn.Module, record: Callable[..., None]) -> None:
    from captum.attr import DeepLift

    assert incompleteness(DeepLift, net) < 1e-4
    missed = incompleteness(DeepLift, attach(net, e_lambda=0.1))
    assert missed > 1e-3
    record(
        tool("captum"),
        "`DeepLift`",
        "works, with a note",
        network="two blocks",
        note=f"the attributions miss completeness by {missed:.0%}; "
        "`return_convergence_delta=True` shows it",
    )


def test_integrated_gradients_are_complete_with_simam(
    net: nn.Module, record: Callable[..., None]
) -> None:
    from captum.attr import IntegratedGradients

    missed = incompleteness(IntegratedGradients, attach(net, e_lambda=0.1))
    assert missed < 0.01  # 50 steps of integration
    record(tool("captum"), "`IntegratedGradients`", "works", network="two blocks")


def test_lrp_is_refused(record: Callable[..., None]) -> None:
    import torchvision
    from captum.attr import LRP

    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    x = torch.rand(1, 3, 64, 64)
    assert LRP(net).attribute(x, target=1).shape == x.shape
    with pytest.raises(TypeError, match=r"simam\.module\.SimAM.* has no rule defined"):
        LRP(attach(net)).attribute(x, target=1)
    record(tool("captum"), "`LRP`", "refused clearly", network="resnet18")
