"""Fused kernels, and which of them serves a tensor. Without them all works, slower."""

import functools
import warnings
from dataclasses import dataclass

from torch import Tensor

from . import cpu


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
    note = cpu.missing or cpu.describe()
    entries = [
        Kernel("cpu", str(dtype).removeprefix("torch."), not cpu.missing, note)
        for dtype in cpu.DTYPES
    ]
    return Kernels([*entries, Kernel("others", "any", False, "no kernel is written for it")])


def serve(x: Tensor) -> bool:
    """Whether a fused kernel takes a tensor like x."""
    return not cpu.missing and x.is_cpu and x.dtype in cpu.DTYPES


@functools.cache
def tell_missing() -> None:
    """Warn, once, that a fused kernel that should be there is not."""
    warnings.warn(
        f"simam runs without its fused CPU kernel, several times slower: {cpu.missing}",
        RuntimeWarning,
        stacklevel=5,  # at the layer or the function that was called
    )
