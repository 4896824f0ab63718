"""The fused CPU kernel: loads the compiled library and calls it with torch's threads."""

import ctypes
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import run_dense

# As in csrc/types.h and csrc/simam_cpu.c.
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ERRORS = {1: "out of memory", 2: "torch's thread pool failed"}

DTYPES = tuple(_DTYPES)


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute SimAM of x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient with respect to x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x, grad_output)


def describe() -> str:
    """Describe how the kernel runs: its instruction set and its threads."""
    level = _library.simam_cpu_level().decode()
    if _parallel_for is None:
        return f"{level}, one thread (torch shares its threads from version 2.10 on)"
    return f"{level}, torch's threads"


def _run(
    x: Tensor,
    grad_output: Tensor | None,
    out: Tensor,
    channels_last: bool,
    e_lambda: float,
    statistics: str,
) -> None:
    """Call the library with dense tensors of equal strides."""
    samples, channels = x.shape[:2]
    options = (
        samples,
        channels,
        x.numel() // (samples * channels or 1),
        e_lambda,
        _DTYPES[x.dtype],
        channels_last,
        statistics == "leave_one_out",
        _parallel_for,
        torch.get_num_threads(),
    )
    if grad_output is None:
        error = _library.simam_forward(x.data_ptr(), out.data_ptr(), *options)
    else:
        tensors = (grad_output.data_ptr(), x.data_ptr(), out.data_ptr())
        error = _library.simam_backward(*tensors, *options)
    if error:
        raise RuntimeError(f"the CPU kernel of simam failed: {_ERRORS[error]}")


def _load() -> tuple[Any, str]:
    """Return the library and an empty string, or None and the reason why there is none."""
    path = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")
    if not path.exists():
        reason = path.with_suffix(".txt")
        detail = reason.read_text() if reason.exists() else f"{path} does not exist"
        return None, f"it was not built ({detail}); install a C compiler and reinstall simam"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it cannot be loaded ({error}); reinstall simam"
    options: list[Any] = [
        *[ctypes.c_int64] * 3,
        ctypes.c_double,
        *[ctypes.c_int] * 3,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    library.simam_forward.argtypes = [*[ctypes.c_void_p] * 2, *options]
    library.simam_backward.argtypes = [*[ctypes.c_void_p] * 3, *options]
    library.simam_cpu_level.restype = ctypes.c_char_p
    return library, ""


def _find_parallel_for() -> int | None:
    """Return the address of torch's parallel loop, a C function that torch exports since 2.10."""
    names = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}
    name = names.get(sys.platform, "libtorch_cpu.so")
    # Some distributions keep the library elsewhere. It is already loaded, so its name is enough.
    for path in (str(Path(torch.__file__).parent / "lib" / name), name):
        try:
            function = ctypes.CDLL(path).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


_library, unavailable_reason = _load()
_parallel_for = _find_parallel_for()
