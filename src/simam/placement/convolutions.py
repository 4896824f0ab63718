"""Which modules count as convolutions.

An adapter of peft (LoRA, for example) around a convolution counts as that convolution: merged, its
weights are added to those of the convolution.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..guards import is_adapter


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution of torch, or has the attributes of one."""
    inner = within_adapters(module)
    return isinstance(inner, nn.modules.conv._ConvNd) or all(
        hasattr(inner, name) for name in ("weight", "in_channels", "kernel_size", "groups")
    )


def holds_spatial_convolution(module: nn.Module) -> bool:
    """Whether the module is or holds a convolution with a kernel > 1 that is not transposed."""
    return any(map(is_spatial, module.modules()))


def is_spatial(module: nn.Module) -> bool:
    """Whether the module is a convolution with a kernel > 1 that is not transposed."""
    inner = within_adapters(module)
    if not is_convolution(inner) or getattr(inner, "transposed", False):
        return False
    return any(size > 1 for size in kernel_size(inner))


def kernel_size(module: nn.Module) -> tuple[int, ...]:
    """The kernel size in every dimension; empty for what is no convolution."""
    size: Any = getattr(within_adapters(module), "kernel_size", ())
    return tuple(size) if isinstance(size, Iterable) else (size,)


def plain_class(module: nn.Module) -> Any:
    """The class of a module; of a module that `attach` changed, the class before."""
    return getattr(module, "plain_class", type(module))


def within_adapters(module: Any) -> nn.Module:
    """The layer that an adapter adapts; any other module is returned as it is."""
    while is_adapter(module):
        module = module.base_layer
    inner: nn.Module = module
    return inner


def parts_of_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules inside adapters: the layers that they adapt, and the adapters' own layers."""
    adapters = filter(is_adapter, model.modules())
    return {part for adapter in adapters for part in adapter.modules() if part is not adapter}
