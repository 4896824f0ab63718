"""The fused GPU kernels: which of them runs for a tensor, on what tiles, and by how many programs.

Triton is imported with the first tensor that needs it, not with this file.
"""

import math
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import fill

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)

# Elements of a tile that holds its channels whole: at most, where backward has two in registers;
# so many that short rows fill it together; and at most where strips can be narrower.
MOST_FORWARD, MOST_BACKWARD = 32768, 16384
ROWS_TILE, STRIPS_TILE = 2048, 16384
# Elements of a tile that moves along the positions.
STEP = 4096
# Bytes of neighbours in strips: a line of the cache, half of it, and the sector that memory is
# read by. The halves are for programs that read their channels again, from an L2 cache that has
# to hold what all programs have begun.
LINE, HALF_LINE, SECTOR = 128, 64, 32
# Programs that share a channel, at most.
PARTS = 32
# Elements of a tile for each warp. Of more than sixteen warps a multiprocessor holds few programs.
WARP, WARPS, MOST_WARPS = 512, 16, 32


class Plan(NamedTuple):
    """On what tiles a kernel runs, of so many channels by positions, and by how many warps.

    Whole tiles hold all positions of their channels. Other programs move along the positions in
    so many steps, and where one has not enough steps for all, several parts share a channel.
    """

    whole: bool
    channels: int
    positions: int
    warps: int
    steps: int = 1
    parts: int = 1


def run(x: Tensor, gradient: Tensor | None, e_lambda: float, statistics: str) -> Tensor:
    """SimAM of x, or with the gradient of its output that of x; either in the layout of x."""

    def kernel(x: Tensor, gradient: Tensor | None, result: Tensor, strips: bool) -> None:
        if x.numel() == 0:
            return
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            _launch(x, gradient, result, strips, e_lambda, statistics)
            return
        with torch.cuda.device(x.device):
            _launch(x, gradient, result, strips, e_lambda, statistics)

    return fill(kernel, x, gradient)


@cache
def able(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def describe() -> str:
    """How the kernels run."""
    major, minor = CAPABILITY
    return f"Triton {version('triton')}, where compute capability is {major}.{minor} or above"


@lru_cache(maxsize=4096)
def choose(
    samples: int,
    channels: int,
    positions: int,
    size: int,
    strips: bool,
    backward: bool,
    multiprocessors: int,
) -> Plan:
    """The plan for elements of `size` bytes; rows count as those of one sample."""
    most = MOST_BACKWARD if backward else MOST_FORWARD
    whole, enough = _power(positions), _power(channels)
    if strips:
        # Places in a tile are numbers of 32 bits.
        longest = _power(2**30 // channels + 1) // 2 or 1
        for bytes_, limit in ((LINE, STRIPS_TILE), (HALF_LINE, STRIPS_TILE), (SECTOR, most)):
            width = min(bytes_ // size, enough)
            if width * whole <= min(limit, most) and whole <= longest:
                return Plan(True, width, whole, _warps(width * whole))
        width = min(HALF_LINE // size, enough)
        length = min(STEP // width, longest)
    else:
        if whole <= most:
            width = min(max(1, ROWS_TILE // whole), enough)
            return Plan(True, width, whole, _warps(width * whole))
        width, length = 1, STEP
    steps, programs = -(-positions // length), samples * -(-channels // width)
    if programs < multiprocessors:
        parts = min(-(-2 * multiprocessors // programs), steps, PARTS)
        steps = -(-steps // parts)
    # What steps are rounded up to may need fewer parts.
    return Plan(
        False, width, length, _warps(width * length), steps, -(-positions // (steps * length))
    )


def _warps(elements: int) -> int:
    if elements > 2 * WARPS * WARP:
        return MOST_WARPS
    return min(max(1, elements // WARP), WARPS)


def _power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()


def _launch(
    x: Tensor,
    gradient: Tensor | None,
    result: Tensor,
    strips: bool,
    e_lambda: float,
    statistics: str,
) -> None:
    kernels, backward = _kernels(), gradient is not None
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    if not strips:
        samples, channels = 1, samples * channels
    plan = choose(
        samples, channels, positions, x.element_size(), strips, backward, _count(x.device)
    )
    maps = (x, gradient, result) if backward else (x, result)
    statistic = (e_lambda, statistics == "leave_one_out")
    # How many neighbours may be read at once, where tiles begin and end between them.
    align = math.gcd(channels, 16) if strips else math.gcd(positions, plan.positions, 16)
    tile = (strips, align, plan.channels, plan.positions)
    grid = (samples * -(-channels // plan.channels), plan.parts, 1)
    options = {"num_warps": plan.warps, "enable_fp_fusion": True}

    if plan.whole:
        kernel = kernels.backward_whole if backward else kernels.forward_whole
        kernel[grid](*maps, channels, positions, *statistic, *tile, **options)
        return
    kernel = kernels.backward_along if backward else kernels.forward_along
    sizes = (channels, positions, plan.steps, samples * channels)
    if plan.parts == 1:
        kernel[grid](*maps, x, *sizes, *statistic, *tile, 1, **options)
        return
    numbers = kernels.MOMENTS.value + kernels.SUMS.value
    found = x.new_empty(numbers * plan.parts * samples * channels, dtype=torch.float32)
    kernels.moments_in_parts[grid](x, found, *sizes, *tile, **options)
    if backward:
        kernels.sums_in_parts[grid](x, gradient, found, *sizes, *statistic, *tile, PARTS, **options)
    kernel[grid](*maps, found, *sizes, *statistic, *tile, PARTS, **options)


@cache
def _count(device: torch.device) -> int:
    """The multiprocessors of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # of none: Triton's interpreter runs on the CPU, one program after the other


def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def _find_missing() -> str:
    if torch.version.cuda is None:  # or it is built for AMD, where no kernel was tried
        return "this torch is built without CUDA"
    if find_spec("triton") is None:
        return "Triton, which torch brings along on Linux, is not installed; install triton"
    return ""


missing = _find_missing()
