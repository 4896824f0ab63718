"""Train and evaluation modes that are set for a while."""

from collections.abc import Container, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def temporary_modes(model: nn.Module, train: Container[nn.Module] = ()) -> Iterator[None]:
    """Set train mode on the modules in `train` and evaluation mode on all others, then restore.

    The modes are set one by one: the `train` method of a module may do more than set them.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = module in train
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
