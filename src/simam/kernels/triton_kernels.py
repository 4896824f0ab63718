"""The fused kernels for a GPU, in Triton. `gpu` says which of them runs, and on what tiles.

Either a tile holds its channels whole and is read once, or programs walk along the positions, tile
by tile: first for the moments, then again for what needs them. What was read before comes from the
L2 cache then, as far as it is large enough. Where there are too few channels to keep a GPU busy,
several programs share a channel, each a part of its positions, and leave each other what they find
in the memory `found`, from one kernel to the next. Program axis 0 numbers the blocks of channels,
axis 1 the parts.
"""

import triton
import triton.language as tl

from .triton_functions import (
    columns,
    deviations,
    energy,
    find_moments,
    find_sums,
    found_moments,
    found_sum,
    gate,
    load,
    pull,
    settle,
    span_of_part,
    tile,
)

# What the parts of a channel find: its moments take three numbers, the sums of its gradient two.
MOMENTS, SUMS = tl.constexpr(3), tl.constexpr(2)


@triton.jit(do_not_specialize=["channels", "positions"])
def forward_whole(
    x,
    result,
    channels,
    positions,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The output, of tiles that hold their channels whole."""
    base, offsets, mask = tile(
        tl.program_id(0), 0, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
    )
    t = load(x, base, offsets, mask)
    d, total = deviations(t, mask, positions)
    u, _, _, _, _ = energy(d, total, positions, e_lambda, LEAVE_ONE_OUT)
    tl.store(result + base + offsets, t * gate(u), mask=mask)


@triton.jit(do_not_specialize=["channels", "positions"])
def backward_whole(
    x,
    gradient,
    result,
    channels,
    positions,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The gradient, of tiles that hold their channels whole."""
    base, offsets, mask = tile(
        tl.program_id(0), 0, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
    )
    t = load(x, base, offsets, mask)
    g = load(gradient, base, offsets, mask)
    d, total = deviations(t, mask, positions)
    u, u_d, u_total, of_deviation, of_total = energy(d, total, positions, e_lambda, LEAVE_ONE_OUT)
    terms, v_d, v_total = pull(t, g, u, u_d, u_total, of_deviation)
    sum_d, sum_total = tl.sum(v_d, 1), tl.sum(v_total, 1)
    dx = settle(terms, d, of_deviation, of_total, sum_d, sum_total, positions)
    tl.store(result + base + offsets, dx, mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "steps", "width"])
def moments_in_parts(
    x,
    found,
    channels,
    positions,
    steps,
    width,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The moments that each part of the channels has."""
    block = tl.program_id(0)
    start, stop = span_of_part(positions, steps, POSITIONS)
    centre, shift, squares = find_moments(
        x, block, start, stop, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
    )
    column, exists = columns(block, channels, CHANNELS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    place = part * width + column
    tl.store(found + place, centre, mask=exists)
    tl.store(found + place + parts * width, shift, mask=exists)
    tl.store(found + place + 2 * parts * width, squares, mask=exists)


@triton.jit(do_not_specialize=["channels", "positions", "steps", "width"])
def forward_along(
    x,
    result,
    found,
    channels,
    positions,
    steps,
    width,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The output. A lone part finds the moments itself; for others `moments_in_parts` has."""
    block = tl.program_id(0)
    start, stop = span_of_part(positions, steps, POSITIONS)
    if PARTS == 1:
        centre, shift, total = find_moments(
            x, block, start, stop, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
    else:
        centre, shift, total = found_moments(
            found, block, steps, width, channels, positions, CHANNELS, POSITIONS, PARTS
        )
    for first in range(start, stop, POSITIONS):
        base, offsets, mask = tile(
            block, first, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
        t = load(x, base, offsets, mask)
        d = t - centre[:, None] - shift[:, None]
        u, _, _, _, _ = energy(d, total, positions, e_lambda, LEAVE_ONE_OUT)
        tl.store(result + base + offsets, t * gate(u), mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "steps", "width"])
def sums_in_parts(
    x,
    gradient,
    found,
    channels,
    positions,
    steps,
    width,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sums that each part of the channels adds to its gradient."""
    block = tl.program_id(0)
    start, stop = span_of_part(positions, steps, POSITIONS)
    centre, shift, total = found_moments(
        found, block, steps, width, channels, positions, CHANNELS, POSITIONS, PARTS
    )
    sum_d, sum_total = find_sums(
        x, gradient, block, start, stop, centre, shift, total, channels, positions, e_lambda,
        LEAVE_ONE_OUT, STRIPS, ALIGN, CHANNELS, POSITIONS,
    )  # fmt: skip
    column, exists = columns(block, channels, CHANNELS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    place = (MOMENTS * parts + part) * width + column
    tl.store(found + place, sum_d, mask=exists)
    tl.store(found + place + parts * width, sum_total, mask=exists)


@triton.jit(do_not_specialize=["channels", "positions", "steps", "width"])
def backward_along(
    x,
    gradient,
    result,
    found,
    channels,
    positions,
    steps,
    width,
    e_lambda,
    LEAVE_ONE_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradient. A lone part finds moments and sums itself; for others the two above have."""
    block = tl.program_id(0)
    start, stop = span_of_part(positions, steps, POSITIONS)
    if PARTS == 1:
        centre, shift, total = find_moments(
            x, block, start, stop, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
        sum_d, sum_total = find_sums(
            x, gradient, block, start, stop, centre, shift, total, channels, positions, e_lambda,
            LEAVE_ONE_OUT, STRIPS, ALIGN, CHANNELS, POSITIONS,
        )  # fmt: skip
    else:
        centre, shift, total = found_moments(
            found, block, steps, width, channels, positions, CHANNELS, POSITIONS, PARTS
        )
        sums = found + MOMENTS * tl.num_programs(1) * width
        sum_d = found_sum(sums, block, width, channels, CHANNELS, PARTS)
        sums += tl.num_programs(1) * width
        sum_total = found_sum(sums, block, width, channels, CHANNELS, PARTS)
    for first in range(start, stop, POSITIONS):
        base, offsets, mask = tile(
            block, first, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
        t, g = load(x, base, offsets, mask), load(gradient, base, offsets, mask)
        d = t - centre[:, None] - shift[:, None]
        u, u_d, u_total, of_deviation, of_total = energy(
            d, total, positions, e_lambda, LEAVE_ONE_OUT
        )
        terms, _, _ = pull(t, g, u, u_d, u_total, of_deviation)
        dx = settle(terms, d, of_deviation, of_total, sum_d, sum_total, positions)
        tl.store(result + base + offsets, dx, mask=mask)
