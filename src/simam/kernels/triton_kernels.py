"""The fused GPU kernels, in Triton. `gpu` chooses the kernel and the size of its tiles.

A single-pass kernel has tiles of whole channels and reads each of them once. A looped kernel moves
along the positions tile by tile, once for the moments and again for whatever needs the moments;
the tiles that it reads again may still be in the L2 cache. Where there are too few channels to
keep a GPU busy, several programs split the positions of a channel, and kernels pass on the results
of each split in `partials` (float32 [quantity, split, channel of all samples]): `partial_moments`
comes before a looped kernel, `partial_sums` between it and `backward_looped`.

Program axis 0 is the block of channels, axis 1 the split.
"""

import triton
import triton.language as tl

from .triton_functions import (
    backward_apply,
    backward_terms,
    combine_moments,
    combine_sum,
    deviations,
    gate,
    inverse_energy,
    load_tile,
    looped_moments,
    looped_sums,
    partial_offsets,
    split_range,
    tile_offsets,
)

# Quantities that `partials` holds: mean_hi, mean_lo and sum_sq; then sum_d and sum_s.
NUM_MOMENTS, NUM_SUMS = tl.constexpr(3), tl.constexpr(2)


@triton.jit(do_not_specialize=["channels", "positions"])
def forward_single_pass(
    x,
    out,
    channels,
    positions,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute the output, with tiles of whole channels."""
    base, offsets, mask = tile_offsets(
        tl.program_id(0), 0, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
    )
    t = load_tile(x, base, offsets, mask)
    d, sum_sq = deviations(t, mask, positions)
    u, _, _, _, _ = inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT)
    tl.store(out + base + offsets, t * gate(u), mask=mask)


@triton.jit(do_not_specialize=["channels", "positions"])
def backward_single_pass(
    x,
    dy,
    dx,
    channels,
    positions,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute the gradient, with tiles of whole channels."""
    base, offsets, mask = tile_offsets(
        tl.program_id(0), 0, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
    )
    t = load_tile(x, base, offsets, mask)
    g = load_tile(dy, base, offsets, mask)
    d, sum_sq = deviations(t, mask, positions)
    u, u_d, u_s, coef_d, coef_s = inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT)
    terms, v_d, v_s = backward_terms(t, g, u, u_d, u_s, coef_d)
    sum_d, sum_s = tl.sum(v_d, 1), tl.sum(v_s, 1)
    gradient = backward_apply(terms, d, coef_d, coef_s, sum_d, sum_s, positions)
    tl.store(dx + base + offsets, gradient, mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "tiles_per_split", "split_stride"])
def partial_moments(
    x,
    partials,
    channels,
    positions,
    tiles_per_split,
    split_stride,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute the moments of each split."""
    block = tl.program_id(0)
    start, stop = split_range(positions, tiles_per_split, BLOCK_M)
    mean_hi, mean_lo, sum_sq = looped_moments(
        x, block, start, stop, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
    )
    offset, exists = partial_offsets(block, channels, BLOCK_C)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    offset = split * split_stride + offset
    tl.store(partials + offset, mean_hi, mask=exists)
    tl.store(partials + offset + num_splits * split_stride, mean_lo, mask=exists)
    tl.store(partials + offset + 2 * num_splits * split_stride, sum_sq, mask=exists)


@triton.jit(do_not_specialize=["channels", "positions", "tiles_per_split", "split_stride"])
def forward_looped(
    x,
    out,
    partials,
    channels,
    positions,
    tiles_per_split,
    split_stride,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Compute the output, tile by tile.

    With one split, computes the moments; otherwise reads those of `partial_moments`.
    """
    block = tl.program_id(0)
    start, stop = split_range(positions, tiles_per_split, BLOCK_M)
    if MAX_SPLITS == 1:
        mean_hi, mean_lo, sum_sq = looped_moments(
            x, block, start, stop, channels, positions,
            CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M,
        )  # fmt: skip
    else:
        mean_hi, mean_lo, sum_sq = combine_moments(
            partials, block, tiles_per_split, split_stride, channels, positions, BLOCK_C, BLOCK_M,
            MAX_SPLITS,
        )  # fmt: skip
    for first in range(start, stop, BLOCK_M):
        base, offsets, mask = tile_offsets(
            block, first, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
        )
        t = load_tile(x, base, offsets, mask)
        d = t - mean_hi[:, None] - mean_lo[:, None]
        u, _, _, _, _ = inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT)
        tl.store(out + base + offsets, t * gate(u), mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "tiles_per_split", "split_stride"])
def partial_sums(
    x,
    dy,
    partials,
    channels,
    positions,
    tiles_per_split,
    split_stride,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Compute sum_d and sum_s of each split, from the moments of `partial_moments`."""
    block = tl.program_id(0)
    start, stop = split_range(positions, tiles_per_split, BLOCK_M)
    mean_hi, mean_lo, sum_sq = combine_moments(
        partials, block, tiles_per_split, split_stride, channels, positions, BLOCK_C, BLOCK_M,
        MAX_SPLITS,
    )  # fmt: skip
    sum_d, sum_s = looped_sums(
        x, dy, block, start, stop, mean_hi, mean_lo, sum_sq, channels, positions, e_lambda,
        LEAVE_ONE_OUT, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M,
    )  # fmt: skip
    offset, exists = partial_offsets(block, channels, BLOCK_C)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    offset = (NUM_MOMENTS * num_splits + split) * split_stride + offset
    tl.store(partials + offset, sum_d, mask=exists)
    tl.store(partials + offset + num_splits * split_stride, sum_s, mask=exists)


@triton.jit(do_not_specialize=["channels", "positions", "tiles_per_split", "split_stride"])
def backward_looped(
    x,
    dy,
    dx,
    partials,
    channels,
    positions,
    tiles_per_split,
    split_stride,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIVISIBILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Compute the gradient, tile by tile.

    With one split, computes the moments and the sums; otherwise reads those of `partial_moments`
    and `partial_sums`.
    """
    block = tl.program_id(0)
    start, stop = split_range(positions, tiles_per_split, BLOCK_M)
    if MAX_SPLITS == 1:
        mean_hi, mean_lo, sum_sq = looped_moments(
            x, block, start, stop, channels, positions,
            CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M,
        )  # fmt: skip
        sum_d, sum_s = looped_sums(
            x, dy, block, start, stop, mean_hi, mean_lo, sum_sq, channels, positions, e_lambda,
            LEAVE_ONE_OUT, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M,
        )  # fmt: skip
    else:
        mean_hi, mean_lo, sum_sq = combine_moments(
            partials, block, tiles_per_split, split_stride, channels, positions, BLOCK_C, BLOCK_M,
            MAX_SPLITS,
        )  # fmt: skip
        sums = partials + NUM_MOMENTS * tl.num_programs(1) * split_stride
        sum_d = combine_sum(sums, block, split_stride, channels, BLOCK_C, MAX_SPLITS)
        sums += tl.num_programs(1) * split_stride
        sum_s = combine_sum(sums, block, split_stride, channels, BLOCK_C, MAX_SPLITS)
    for first in range(start, stop, BLOCK_M):
        base, offsets, mask = tile_offsets(
            block, first, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
        )
        t, g = load_tile(x, base, offsets, mask), load_tile(dy, base, offsets, mask)
        d = t - mean_hi[:, None] - mean_lo[:, None]
        u, u_d, u_s, coef_d, coef_s = inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT)
        terms, _, _ = backward_terms(t, g, u, u_d, u_s, coef_d)
        gradient = backward_apply(terms, d, coef_d, coef_s, sum_d, sum_s, positions)
        tl.store(dx + base + offsets, gradient, mask=mask)
