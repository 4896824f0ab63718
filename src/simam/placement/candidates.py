"""Which modules may be residual blocks, judged by their code before any trace."""

from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn

from .convolutions import holds_spatial_convolution, is_convolution, plain_class
from .sums import contains_sum


def may_be_residual(block: nn.Module) -> bool:
    """Whether a module holds a spatial convolution and contains an addition.

    The addition may stand in its class, in a function that its class calls, or in a child without
    spatial convolutions that takes both operands.
    """
    kind = plain_class(block)
    if kind.__module__.startswith("torch.") or is_convolution(block):
        return False
    adds = _adds(kind) or any(map(_is_helper, block.children()))
    return adds and holds_spatial_convolution(block)


def _is_helper(child: nn.Module) -> bool:
    kind = plain_class(child)
    is_of_torch = kind.__module__.startswith("torch.")
    adds = not is_of_torch and contains_sum(kind.forward, of_inputs=True)
    return adds and not holds_spatial_convolution(child)


@cache
def _adds(kind: type) -> bool:
    """Whether a method of the class other than its constructor, or a function, contains a sum."""
    methods = list(_methods(kind))
    return any(map(contains_sum, methods)) or any(
        contains_sum(function, of_inputs=True)
        for method in methods
        for function in _functions_in(method)
    )


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, method in vars(base).items():
                if isinstance(method, FunctionType) and name != "__init__":
                    yield method


def _functions_in(method: FunctionType) -> Iterator[FunctionType]:
    """The functions that a method calls by a global name."""
    for name in method.__code__.co_names:
        function = method.__globals__.get(name)
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            yield function
