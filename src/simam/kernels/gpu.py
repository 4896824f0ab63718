"""The fused GPU kernels: chooses the kernel and its tiles for a tensor, and launches it.

Triton is imported at the first launch, not with this file.
"""

import math
from functools import cache, lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import run_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)

# The most elements of a tile of whole channels. Backward keeps two tensors in registers.
MAX_TILE_FORWARD, MAX_TILE_BACKWARD = 32768, 16384
# Short contiguous channels fill a tile of this many elements together.
SHORT_CHANNELS_TILE = 2048
# Elements of a tile that moves along the positions.
LOOPED_TILE = 4096
# Bytes of adjacent channels in a channels-last tile: a cache line, half of it, or the sector, which
# is the unit of memory reads. Looped kernels take half a line: they read their channels again from
# an L2 cache that has to hold the channels of all running programs.
CACHE_LINE, HALF_LINE, SECTOR = 128, 64, 32
# The most elements of a tile of CACHE_LINE or HALF_LINE; a larger one takes SECTOR.
WIDE_TILE = 16384
# The most programs that share a channel.
MAX_SPLITS = 32
# Elements per warp of a program, and the most warps. A multiprocessor holds few programs of more
# than 16 warps, so only the largest tiles take 32.
ELEMENTS_PER_WARP, USUAL_WARPS, MAX_WARPS = 512, 16, 32


class TileConfig(NamedTuple):
    """The tile of a program, its warps, and how a channel is divided among programs.

    Attributes:
        single_pass (bool): whether a tile holds all positions of its channels.
        block_c (int): channels of a tile, a power of two.
        block_m (int): positions of a tile, a power of two.
        num_warps (int): warps of a program.
        tiles_per_split (int): tiles that one program of a looped kernel moves along.
        num_splits (int): programs that share a channel.
    """

    single_pass: bool
    block_c: int
    block_m: int
    num_warps: int
    tiles_per_split: int = 1
    num_splits: int = 1


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute SimAM of x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient with respect to x, in the layout of x."""
    return run_dense(partial(_run, e_lambda=e_lambda, statistics=statistics), x, grad_output)


@cache
def device_supported(device: torch.device) -> bool:
    """Return whether the kernels run on a device."""
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def describe() -> str:
    """Describe how the kernels run."""
    major, minor = MIN_CAPABILITY
    return f"Triton {version('triton')}, where compute capability is {major}.{minor} or above"


@lru_cache(maxsize=4096)
def choose_config(
    samples: int,
    channels: int,
    positions: int,
    element_size: int,
    channels_last: bool,
    backward: bool,
    multiprocessors: int,
) -> TileConfig:
    """Choose the tiles for a tensor.

    Args:
        samples (int): N, or 1 in the contiguous layout.
        channels (int): C, or N * C in the contiguous layout.
        positions (int): M.
        element_size (int): bytes of an element.
        channels_last (bool): the layout.
        backward (bool): whether the gradient is computed.
        multiprocessors (int): those of the GPU.
    """
    max_tile = MAX_TILE_BACKWARD if backward else MAX_TILE_FORWARD
    all_positions, all_channels = _next_power_of_two(positions), _next_power_of_two(channels)
    if channels_last:
        # Offsets within a tile are 32-bit integers.
        max_positions = _next_power_of_two(2**30 // channels + 1) // 2 or 1
        for width, limit in ((CACHE_LINE, WIDE_TILE), (HALF_LINE, WIDE_TILE), (SECTOR, max_tile)):
            block_c = min(width // element_size, all_channels)
            fits = block_c * all_positions <= min(limit, max_tile)
            if fits and all_positions <= max_positions:
                return TileConfig(True, block_c, all_positions, _num_warps(block_c * all_positions))
        block_c = min(HALF_LINE // element_size, all_channels)
        block_m = min(LOOPED_TILE // block_c, max_positions)
    else:
        if all_positions <= max_tile:
            block_c = min(max(1, SHORT_CHANNELS_TILE // all_positions), all_channels)
            return TileConfig(True, block_c, all_positions, _num_warps(block_c * all_positions))
        block_c, block_m = 1, LOOPED_TILE
    tiles_per_split = _ceil_div(positions, block_m)
    programs = samples * _ceil_div(channels, block_c)
    if programs < multiprocessors:
        splits = min(_ceil_div(2 * multiprocessors, programs), tiles_per_split, MAX_SPLITS)
        tiles_per_split = _ceil_div(tiles_per_split, splits)
    # tiles_per_split was rounded up, so fewer splits may be enough.
    num_splits = _ceil_div(positions, tiles_per_split * block_m)
    num_warps = _num_warps(block_c * block_m)
    return TileConfig(False, block_c, block_m, num_warps, tiles_per_split, num_splits)


def _num_warps(elements: int) -> int:
    if elements > 2 * USUAL_WARPS * ELEMENTS_PER_WARP:
        return MAX_WARPS
    return min(max(1, elements // ELEMENTS_PER_WARP), USUAL_WARPS)


def _next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _run(
    x: Tensor,
    grad_output: Tensor | None,
    out: Tensor,
    channels_last: bool,
    e_lambda: float,
    statistics: str,
) -> None:
    """Launch the kernels on the device of x."""
    if x.numel() == 0:
        return
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        _launch(x, grad_output, out, channels_last, e_lambda, statistics)
        return
    with torch.cuda.device(x.device):
        _launch(x, grad_output, out, channels_last, e_lambda, statistics)


def _launch(
    x: Tensor,
    grad_output: Tensor | None,
    out: Tensor,
    channels_last: bool,
    e_lambda: float,
    statistics: str,
) -> None:
    kernels, backward = _triton_kernels(), grad_output is not None
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    if not channels_last:
        samples, channels = 1, samples * channels
    config = choose_config(
        samples,
        channels,
        positions,
        x.element_size(),
        channels_last,
        backward,
        _multiprocessors(x.device),
    )
    grid = (samples * _ceil_div(channels, config.block_c), config.num_splits, 1)
    tensors = {"x": x, "dy": grad_output, "dx": out} if backward else {"x": x, "out": out}
    formula = {"e_lambda": e_lambda, "LEAVE_ONE_OUT": statistics == "leave_one_out"}
    # Tiles begin and end at multiples of DIVISIBILITY, so that many elements may be read at once.
    sizes = (channels,) if channels_last else (positions, config.block_m)
    tile = {
        "channels": channels,
        "positions": positions,
        "CHANNELS_LAST": channels_last,
        "DIVISIBILITY": math.gcd(*sizes, 16),
        "BLOCK_C": config.block_c,
        "BLOCK_M": config.block_m,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }
    if config.single_pass:
        kernel = kernels.backward_single_pass if backward else kernels.forward_single_pass
        kernel[grid](**tensors, **formula, **tile)
        return

    kernel = kernels.backward_looped if backward else kernels.forward_looped
    split_stride = samples * channels
    split = {"tiles_per_split": config.tiles_per_split, "split_stride": split_stride}
    if config.num_splits == 1:
        # `partials` is not used, but a pointer has to be passed.
        kernel[grid](**tensors, partials=x, MAX_SPLITS=1, **split, **formula, **tile)
        return
    quantities = kernels.NUM_MOMENTS.value + kernels.NUM_SUMS.value
    partials = x.new_empty(quantities * config.num_splits * split_stride, dtype=torch.float32)
    kernels.partial_moments[grid](x=x, partials=partials, **split, **tile)
    split["MAX_SPLITS"] = MAX_SPLITS
    if backward:
        kernels.partial_sums[grid](
            x=x, dy=grad_output, partials=partials, **split, **formula, **tile
        )
    kernel[grid](**tensors, partials=partials, **split, **formula, **tile)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # Triton's interpreter runs on the CPU, one program after the other.


def _triton_kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def _find_unavailable_reason() -> str:
    if torch.version.cuda is None:  # includes torch for AMD GPUs, where no kernel was tested
        return "this torch is built without CUDA"
    if find_spec("triton") is None:
        return "Triton, which torch brings along on Linux, is not installed; install triton"
    return ""


unavailable_reason = _find_unavailable_reason()
