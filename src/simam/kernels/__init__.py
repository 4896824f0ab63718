"""Fused kernels, and which of them serves a tensor. Without them all works, slower."""

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu, gpu


@dataclass(frozen=True)
class Kernel:
    """What computes `simam` for a device and a dtype.

    Attributes:
        device (str): type of device.
        dtype (str): name of the dtype.
        fused (bool): whether it is a fused kernel; if not, plain torch operations.
        note (str): how it runs, or why there is none.
    """

    device: str
    dtype: str
    fused: bool
    note: str


class Kernels(tuple[Kernel, ...]):
    """Every `Kernel`; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("device", "dtype", "kernel", "")]
        for entry in self:
            kernel = "fused" if entry.fused else "plain torch"
            rows.append((entry.device, entry.dtype, kernel, entry.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def kernels_info() -> Kernels:
    """Tell which kernel serves which device and dtype, and why not where none does.

    Whatever it says, `torch.func` transforms, forward-mode AD, tensor subclasses, and exported,
    scripted and traced graphs run plain torch operations, and so do `attention` and `energy`.

    Returns:
        Kernels: a tuple of `Kernel`, which prints as a table.

    Examples:
        >>> [entry.dtype for entry in kernels_info() if entry.device == "cpu"]
        ['float64', 'float32', 'bfloat16', 'float16']
    """
    entries = []
    for device, kernel in (("cpu", cpu), ("cuda", gpu)):
        note = kernel.missing or kernel.describe()
        for dtype in cpu.DTYPES:
            name, written = str(dtype).removeprefix("torch."), dtype in kernel.DTYPES
            fused = written and not kernel.missing
            entries.append(Kernel(device, name, fused, note if written else "not written for it"))
    return Kernels([*entries, Kernel("others", "any", False, "no kernel is written for them")])


def serve(x: Tensor) -> bool:
    """Whether a fused kernel takes a tensor like x."""
    if x.is_cpu:
        return not cpu.missing and x.dtype in cpu.DTYPES
    if not x.is_cuda or gpu.missing or x.dtype not in gpu.DTYPES:
        return False
    # The compiler need not look at the device, since the operator that it calls will.
    return torch.compiler.is_compiling() or gpu.able(x.device)


def run(x: Tensor, gradient: Tensor | None, e_lambda: float, statistics: str) -> Tensor:
    """SimAM of an x that is served, or with the gradient of its output that of x."""
    kernel = cpu.run if x.is_cpu else gpu.run
    return kernel(x, gradient, e_lambda, statistics)


def tell_missing(x: Tensor) -> None:
    """Warn, once for a type of device, that a fused kernel that should be there is not."""
    if x.is_cpu and cpu.missing:
        _warn("CPU", cpu.missing)
    elif x.is_cuda and gpu.missing and torch.version.cuda is not None:  # not on AMD's
        _warn("GPU", gpu.missing)


@functools.cache
def _warn(device: str, reason: str) -> None:
    warnings.warn(
        f"simam runs without its fused {device} kernel, several times slower: {reason}",
        RuntimeWarning,
        stacklevel=6,  # at the layer or the function that was called
    )
