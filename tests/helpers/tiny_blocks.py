"""Residual blocks just large enough to show a rule."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from simam import SimAM, plan


class Block(nn.Module):
    """Two spatial convolutions, and any other modules that are passed."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in {"conv1": conv(), "conv2": conv(), **parts}.items():
            self.add_module(name, part)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


def block(forward: Callable[..., object]) -> type[Block]:
    """A block class with the given forward."""
    return type(forward.__name__, (Block,), {"forward": forward, "__module__": __name__})


def conv(kernel: int = 3, channels: int = 8, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels, 8, kernel, padding=kernel // 2, **options)


@block
def basic(self, x):
    return (x + self.branch(x)).relu()


def host_paths(model: nn.Module, example: object = None) -> list[str]:
    return [insertion.path for insertion in plan(model, example=example)]


def assert_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^found no place for SimAM"):
        plan(model)


def snapshot(model: nn.Module) -> object:
    """Everything a model's modules hold: attributes in order, tensors by identity and version."""

    def fingerprint(value: object) -> object:
        if isinstance(value, Tensor):
            return id(value), value._version, value.requires_grad
        if isinstance(value, dict):
            return [(key, fingerprint(item)) for key, item in value.items()]
        return id(value) if isinstance(value, nn.Module) else value

    return [(p, type(m), fingerprint(vars(m))) for p, m in model.named_modules()]


def attached(model: nn.Module) -> dict[str, SimAM]:
    return {path: m for path, m in model.named_modules() if isinstance(m, SimAM)}
