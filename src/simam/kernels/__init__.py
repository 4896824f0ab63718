"""Fused kernels for SimAM, per device and dtype. Without them everything works, only slower."""

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..messages import table
from . import cpu, gpu


@dataclass(frozen=True)
class Kernel:
    """How `simam` is computed on a device, in a dtype.

    Attributes:
        device (str): type of device.
        dtype (str): name of the dtype.
        fused (bool): whether there is a fused kernel; if not, plain torch operations run.
        note (str): how the kernel runs, or why there is none.
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
        return table(rows)


def kernels_info() -> Kernels:
    """List the kernel for each device and dtype, or why there is none.

    Some calls never use a fused kernel: `attention`, `energy`, `torch.func` transforms,
    forward-mode AD, tensor subclasses, and exported, scripted and traced graphs run plain torch
    operations.

    Returns:
        Kernels: a tuple of `Kernel`, which prints as a table.

    Examples:
        >>> [entry.dtype for entry in kernels_info() if entry.device == "cpu"]
        ['float64', 'float32', 'bfloat16', 'float16']
    """
    entries = []
    for device, kernel in (("cpu", cpu), ("cuda", gpu)):
        note = kernel.unavailable_reason or kernel.describe()
        for dtype in cpu.DTYPES:
            name, written = str(dtype).removeprefix("torch."), dtype in kernel.DTYPES
            fused = written and not kernel.unavailable_reason
            entries.append(
                Kernel(device, name, fused, note if written else "no kernel for this dtype")
            )
    return Kernels([*entries, Kernel("others", "any", False, "no kernel for other devices")])


def is_supported(x: Tensor) -> bool:
    """Return whether there is a fused kernel for the device and dtype of x."""
    if x.is_cpu:
        return not cpu.unavailable_reason and x.dtype in cpu.DTYPES
    if not x.is_cuda or gpu.unavailable_reason or x.dtype not in gpu.DTYPES:
        return False
    # While compiling, the device is not checked: the operator that is compiled checks it.
    return torch.compiler.is_compiling() or gpu.device_supported(x.device)


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute SimAM of a supported x, in the layout of x."""
    kernel = cpu.forward if x.is_cpu else gpu.forward
    return kernel(x, e_lambda, statistics)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient with respect to a supported x, in the layout of x."""
    kernel = cpu.backward if x.is_cpu else gpu.backward
    return kernel(grad_output, x, e_lambda, statistics)


def warn_if_unavailable(x: Tensor) -> None:
    """Warn, once per device type, if the device of x should have a fused kernel and has none."""
    if x.is_cpu and cpu.unavailable_reason:
        _warn("CPU", cpu.unavailable_reason)
    # torch for AMD GPUs calls them cuda too; there is no kernel for them.
    elif x.is_cuda and gpu.unavailable_reason and torch.version.cuda is not None:
        _warn("GPU", gpu.unavailable_reason)


@functools.cache
def _warn(device: str, reason: str) -> None:
    warnings.warn(
        f"simam runs without its fused {device} kernel, several times slower: {reason}",
        RuntimeWarning,
        stacklevel=6,  # at the caller of the layer or function
    )
