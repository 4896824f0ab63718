"""What memory a kernel sees: dense, in rows or in strips, all tensors alike."""

from collections.abc import Callable

import torch
from torch import Tensor

Fill = Callable[[Tensor, Tensor | None, Tensor, bool], None]


def fill(kernel: Fill, x: Tensor, gradient: Tensor | None) -> Tensor:
    """A tensor like x, in its layout, that `kernel(x, gradient, result, strips)` writes.

    Contiguous (rows) and channels-last (strips) tensors are read where they lie, others from a
    copy.
    """
    if x.is_contiguous():
        strips = False
    elif x.movedim(1, -1).is_contiguous():
        strips = True
    else:
        pull = None if gradient is None else gradient.contiguous()
        return torch.empty_like(x).copy_(fill(kernel, x.contiguous(), pull))
    if gradient is not None and gradient.stride() != x.stride():
        gradient = torch.empty_like(x).copy_(gradient)
    result = torch.empty_like(x)
    kernel(x, gradient, result, strips)
    return result
