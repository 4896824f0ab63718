"""Gives kernels dense tensors in one layout: contiguous or channels-last."""

from collections.abc import Callable

import torch
from torch import Tensor

DenseKernel = Callable[[Tensor, Tensor | None, Tensor, bool], None]


def run_dense(kernel: DenseKernel, x: Tensor, grad_output: Tensor | None = None) -> Tensor:
    """Call `kernel(x, grad_output, out, channels_last)` and return the `out` that it writes.

    The kernel gets tensors of equal strides, either contiguous or channels-last. An x that is
    neither, and a grad_output with other strides than x, are copied first. The result has the
    strides of `torch.empty_like(x)`.
    """
    if x.is_contiguous():
        channels_last = False
    elif x.movedim(1, -1).is_contiguous():
        channels_last = True
    else:
        return torch.empty_like(x).copy_(run_dense(kernel, x.contiguous(), grad_output))
    if grad_output is not None and grad_output.stride() != x.stride():
        grad_output = torch.empty_like(x).copy_(grad_output)
    out = torch.empty_like(x)
    kernel(x, grad_output, out, channels_last)
    return out
