"""The fused CPU kernel: finds the compiled library, and lends it torch's threads."""

import ctypes
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As numbered in cpu.h.
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_STATISTICS = {"shared": 0, "leave_one_out": 1}
_ERRORS = {1: "out of memory", 2: "torch's thread pool failed"}


def serves(x: Tensor) -> bool:
    """Whether `run` takes a tensor like x."""
    return _library is not None and x.is_cpu and x.dtype in _DTYPES


def run(x: Tensor, gradient: Tensor | None, e_lambda: float, statistics: str) -> Tensor:
    """SimAM of x, or with the gradient of its output that of x; both in the layout of x.

    Contiguous and channels-last tensors are computed where they lie, others in a copy.
    """
    result = torch.empty_like(x)
    if x.is_contiguous():
        strips = False
    elif x.movedim(1, -1).is_contiguous():
        strips = True
    else:
        pull = None if gradient is None else gradient.contiguous()
        return result.copy_(run(x.contiguous(), pull, e_lambda, statistics))
    if gradient is not None and gradient.stride() != x.stride():
        gradient = torch.empty_like(x).copy_(gradient)
    samples, channels = x.shape[:2]
    status = _library.simam_cpu(
        x.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        result.data_ptr(),
        samples,
        channels,
        x.numel() // (samples * channels or 1),
        e_lambda,
        _DTYPES[x.dtype],
        strips,
        _STATISTICS[statistics],
        _parallel_for,
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"the CPU kernel of simam stopped: {_ERRORS[status]}")
    return result


def describe() -> tuple[str | None, str]:
    """The kernel, or None, and how it runs or why there is none."""
    if _library is None:
        return None, _missing
    level = _library.simam_cpu_level().decode()
    if _parallel_for is None:
        return f"fused C ({level})", "on one thread: the threads of torch can be lent from 2.10 on"
    return f"fused C ({level})", "on the threads of torch"


def _load() -> tuple[Any, str]:
    folder = Path(__file__).parent
    files = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()]
    if not files:
        return None, (
            f"{folder} holds no compiled _cpu library; install a C compiler, then simam anew: "
            "pip install --force-reinstall --no-deps --no-binary simam simam"
        )
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return None, f"{files[0].name} cannot be loaded ({error}); install simam anew"
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
    for path in (str(Path(torch.__file__).parent / "lib" / name), name):
        try:
            function = ctypes.CDLL(path).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


_library, _missing = _load()
_parallel_for = _find_parallel_for()
