"""The rule of where SimAM goes, clause by clause, on networks just large enough to show it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simam import plan


class Block(nn.Module):
    """Holds the parts it is given; a subclass connects them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Gated(Block):
    """A basic block with a gate before its sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        return x + y * self.gate(y)


def conv(kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, **options)


def basic() -> dict[str, nn.Module]:
    return {"conv1": conv(), "norm1": nn.BatchNorm2d(8), "conv2": conv(), "norm2": nn.BatchNorm2d(8)}


def points(model: nn.Module) -> list[str]:
    return [insertion.path for insertion in plan(model)]


def assert_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^found no place for SimAM"):
        plan(model)
