"""The fused CPU kernel: finds the compiled library, and lends it torch's threads."""

import ctypes
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import run_dense

# As numbered in cpu.h.
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_STATISTICS = {"shared": 0, "leave_one_out": 1}
_ERRORS = {1: "it ran out of memory", 2: "torch's thread pool failed"}

DTYPES = tuple(_DTYPES)


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute SimAM of x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient with respect to x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x, grad_output)


def _run(
    x: Tensor,
    grad_output: Tensor | None,
    out: Tensor,
    channels_last: bool,
    e_lambda: float,
    statistics: str,
) -> None:
    samples, channels = x.shape[:2]
    error = _library.simam_cpu(
        x.data_ptr(),
        None if grad_output is None else grad_output.data_ptr(),
        out.data_ptr(),
        samples,
        channels,
        x.numel() // (samples * channels or 1),
        e_lambda,
        _DTYPES[x.dtype],
        channels_last,
        _STATISTICS[statistics],
        _parallel_for,
        torch.get_num_threads(),
    )
    if error:
        raise RuntimeError(f"the CPU kernel of simam stopped: {_ERRORS[error]}")


def describe() -> str:
    """How the kernel runs."""
    level = _library.simam_cpu_level().decode()
    if _parallel_for is None:
        return f"{level}, one thread (torch lends its threads from 2.10 on)"
    return f"{level}, torch's threads"


def _load() -> tuple[Any, str]:
    """The library, or None and the reason."""
    path = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")
    if not path.exists():
        reason = path.with_suffix(".txt")
        found = reason.read_text() if reason.exists() else f"there is no {path}"
        return None, f"it was not built ({found}); install a C compiler, then simam anew"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it cannot be loaded ({error}); install simam anew"
    library.simam_cpu.argtypes = [
        *[ctypes.c_void_p] * 3,
        *[ctypes.c_int64] * 3,
        ctypes.c_double,
        *[ctypes.c_int] * 3,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    library.simam_cpu_level.restype = ctypes.c_char_p
    return library, ""


def _find_parallel_for() -> int | None:
    """The address of torch's parallel loop, a plain C function from torch 2.10 on."""
    names = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}
    name = names.get(sys.platform, "libtorch_cpu.so")
    # By its name alone, where a distribution keeps it elsewhere: it is loaded already.
    for path in (str(Path(torch.__file__).parent / "lib" / name), name):
        try:
            function = ctypes.CDLL(path).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


_library, unavailable_reason = _load()
_parallel_for = _find_parallel_for()
