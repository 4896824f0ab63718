"""Copies of a module that are safe to run: they share nothing with the module."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .. import hosts


def skeleton(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy without hooks and attached SimAM, in evaluation mode.

    Args:
        module (nn.Module): the module; it does not change.
        convert (callable): makes the copy of a tensor. Lazy parameters are kept.
    """

    def copied(tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return tensor
        value = convert(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(value, tensor.requires_grad) if is_parameter else value

    memo = {id(t): copied(t) for t in chain(module.parameters(), module.buffers())}
    with _TensorCopies(copied):
        clone = copy.deepcopy(module, memo)
    clone.eval()
    for part in list(clone.modules()):
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if hosts.is_changed(part) and not hosts.class_was_changed_since(part):
            hosts.undo(part)
    return clone


class _TensorCopies(TorchFunctionMode):
    """Makes deep copies of tensors that are neither parameters nor buffers.

    `copy.deepcopy` itself refuses tensors with a gradient function, which old-style weight norm
    leaves behind as the weight of a convolution.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return self.copied(args[0])
        return func(*args, **(kwargs or {}))
