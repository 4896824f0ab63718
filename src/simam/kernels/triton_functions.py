"""Device functions of the Triton kernels: tiles, arithmetic, moments and sums.

A block is a group of BLOCK_C channels of one sample, and a tile is a block by BLOCK_M positions.
Blocks are numbered through all samples. In the contiguous layout the positions of a channel are
adjacent in memory, and all N * C channels count as channels of one sample. In the channels-last
layout the channels of a position are adjacent.

The formulas are those of `reference`. With a neuron t, its gradient g of the output,
u = 1 / e* - 1/2, the gate s = sigmoid(u + 1/2) and v = g t s (1 - s), the gradient of the input is

    dx = g s + v u_d + 2 d sum(v u_S) - mean(v u_d),

where u_d and u_S are the derivatives of u with respect to d, the deviation from the mean, and to
S, the sum of the d^2. Each is the product of a coefficient of the channel, coef_d or coef_s, and
of a factor of the neuron. The variables u_d, u_s, v_d and v_s leave the coefficient out, and so do
the sums of them, sum_d and sum_s.

The mean of a channel is mean_hi + mean_lo: mean_lo keeps the digits that mean_hi rounds away.
"""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(block, start, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M):
    """Compute where a tile starts, its elements' offsets from there, and which of them exist.

    Dividing and multiplying a size by DIVISIBILITY leaves it unchanged. The compiler learns that
    the size is a multiple, so it may use wide loads and stores.
    """
    sample, channel = block_origin(block, channels, BLOCK_C)
    c, m = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        stride = channels // DIVISIBILITY * DIVISIBILITY
        base = (sample * positions + start) * stride + channel
        offsets = c[:, None] + m[None, :] * stride
        mask = (c < stride - channel)[:, None] & (m < positions - start)[None, :]
    else:
        stride = positions // DIVISIBILITY * DIVISIBILITY
        base = channel * stride + start
        offsets = c[:, None] * stride + m[None, :]
        mask = (c < channels - channel)[:, None] & (m < stride - start)[None, :]
    return base, offsets, mask


@triton.jit
def block_origin(block, channels, BLOCK_C):
    """Compute the sample of a block and the block's first channel within the sample."""
    blocks_per_sample = tl.cdiv(channels, BLOCK_C)
    sample = (block // blocks_per_sample).to(tl.int64)
    return sample, (block % blocks_per_sample).to(tl.int64) * BLOCK_C


@triton.jit
def load_tile(pointer, base, offsets, mask):
    """Load a tile as float32, with zeros where no element exists."""
    return tl.load(pointer + base + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit
def deviations(t, mask, positions):
    """Compute the deviations from the mean, and the sum of their squares, of whole channels.

    The mean is subtracted in two steps, because the rounding error of a large mean would show in
    the gate. Elements that do not exist are set to zero after the mean is subtracted.
    """
    mean_hi = tl.sum(t, 1) / positions
    d = tl.where(mask, t - mean_hi[:, None], 0)
    mean_lo = tl.sum(d, 1) / positions
    d = tl.where(mask, d - mean_lo[:, None], 0)
    return d, tl.sum(d * d, 1)


@triton.jit
def inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT):
    """Compute u, its derivatives u_d and u_s without their coefficients, and the coefficients."""
    m_minus_1 = tl.maximum(positions - 1, 1).to(tl.float32)
    if LEAVE_ONE_OUT:
        # t - mu_t, the deviation from the mean of the other neurons.
        d_others = d * (positions / m_minus_1)
        # Where one neuron holds nearly all of S, cancellation may make the difference negative.
        sum_sq_others = tl.maximum(sum_sq[:, None] - d * d_others, 0)
        variance = sum_sq_others / m_minus_1 + e_lambda
        ratio = d_others / variance
        u = d_others * ratio * 0.25
        u_d = ratio * (positions + d_others * ratio)
        u_s = u / variance
        coef_d = tl.zeros_like(sum_sq) + 0.5 / m_minus_1
        coef_s = tl.zeros_like(sum_sq) - 1 / m_minus_1
    else:
        # A lambda too small for float32 would give 0 / 0 in a constant channel. The bound is
        # below the largest float32, because four times q must be finite as well.
        q = tl.minimum(0.25 / (sum_sq / m_minus_1 + e_lambda), 1e37)
        u = d * d * q[:, None]
        u_d = d
        u_s = u
        coef_d = 2 * q
        coef_s = -4 * q / m_minus_1
    return u, u_d, u_s, coef_d, coef_s


@triton.jit
def gate(u):
    """Compute the factor by which SimAM multiplies a neuron."""
    return 1 / (1 + tl.exp(-u - 0.5))


@triton.jit
def backward_terms(t, g, u, u_d, u_s, coef_d):
    """Compute the terms g s + v u_d of the gradient, and the summands v_d and v_s."""
    e = tl.exp(-u - 0.5)
    s = 1 / (1 + e)
    v = g * t * s * (e * s)
    return g * s + coef_d[:, None] * (v * u_d), v * u_d, v * u_s


@triton.jit
def backward_apply(terms, d, coef_d, coef_s, sum_d, sum_s, positions):
    """Compute the gradient from its neurons' own terms and the sums over the channel."""
    slope = 2 * coef_s * sum_s
    mean = coef_d * sum_d / positions
    return terms + slope[:, None] * d - mean[:, None]


@triton.jit
def looped_moments(
    x, block, start, stop, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
):
    """Compute mean_hi, mean_lo and the sum of squared deviations over positions start to stop.

    Each lane updates a mean and a sum of squares of its own (Welford); all lanes are combined once
    at the end (Chan, Golub and LeVeque). The first tile's mean is mean_hi. It is subtracted from
    every value, so that the lanes keep the digits that a large mean would take.
    """
    base, offsets, mask = tile_offsets(
        block, start, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
    )
    mean_hi = tl.sum(load_tile(x, base, offsets, mask), 1) / tl.minimum(stop - start, BLOCK_M)
    mean = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    sum_sq = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    tiles = 0.0
    for first in range(start, stop, BLOCK_M):
        base, offsets, mask = tile_offsets(
            block, first, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
        )
        t = load_tile(x, base, offsets, mask) - mean_hi[:, None]
        tiles += 1
        delta = tl.where(mask, t - mean, 0)
        mean += delta * (1 / tiles)
        sum_sq += delta * (t - mean)
    lane = tl.arange(0, BLOCK_M)
    counts = ((stop - start + BLOCK_M - 1 - lane) // BLOCK_M).to(tl.float32)[None, :]
    count = (stop - start).to(tl.float32)
    mean_lo = tl.sum(counts * mean, 1) / count
    distance = mean - mean_lo[:, None]
    return mean_hi, mean_lo, tl.sum(sum_sq + counts * distance * distance, 1)


@triton.jit
def looped_sums(
    x, dy, block, start, stop, mean_hi, mean_lo, sum_sq, channels, positions, e_lambda,
    LEAVE_ONE_OUT, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M,
):  # fmt: skip
    """Compute sum_d and sum_s over positions start to stop."""
    sum_d = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    sum_s = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for first in range(start, stop, BLOCK_M):
        base, offsets, mask = tile_offsets(
            block, first, channels, positions, CHANNELS_LAST, DIVISIBILITY, BLOCK_C, BLOCK_M
        )
        t, g = load_tile(x, base, offsets, mask), load_tile(dy, base, offsets, mask)
        d = tl.where(mask, t - mean_hi[:, None] - mean_lo[:, None], 0)
        u, u_d, u_s, coef_d, _ = inverse_energy(d, sum_sq, positions, e_lambda, LEAVE_ONE_OUT)
        _, v_d, v_s = backward_terms(t, g, u, u_d, u_s, coef_d)
        sum_d += v_d
        sum_s += v_s
    return tl.sum(sum_d, 1), tl.sum(sum_s, 1)


@triton.jit
def split_range(positions, tiles_per_split, BLOCK_M):
    """Compute the first and the last position, exclusive, of this program's split."""
    start = tl.program_id(1).to(tl.int64) * tiles_per_split * BLOCK_M
    return start, tl.minimum(start + tiles_per_split * BLOCK_M, positions)


@triton.jit
def partial_offsets(block, channels, BLOCK_C):
    """Compute the offsets of a block's channels in a row of `partials`, and which exist."""
    sample, channel = block_origin(block, channels, BLOCK_C)
    channel += tl.arange(0, BLOCK_C)
    return sample * channels + channel, channel < channels


@triton.jit
def combine_moments(
    partials, block, tiles_per_split, split_stride, channels, positions, BLOCK_C, BLOCK_M,
    MAX_SPLITS,
):  # fmt: skip
    """Combine the moments of all splits into those of whole channels (Chan, Golub, LeVeque)."""
    offset, exists = partial_offsets(block, channels, BLOCK_C)
    num_splits = tl.num_programs(1)
    split = tl.arange(0, MAX_SPLITS)
    mask = exists[:, None] & (split < num_splits)[None, :]
    length = tiles_per_split * BLOCK_M
    counts = tl.minimum(positions - split.to(tl.int64) * length, length)
    counts = tl.where(split < num_splits, counts, 0).to(tl.float32)[None, :]
    offsets = split[None, :] * split_stride + offset[:, None]
    split_mean_hi = tl.load(partials + offsets, mask=mask, other=0)
    split_mean_lo = tl.load(partials + offsets + num_splits * split_stride, mask=mask, other=0)
    sum_sq = tl.load(partials + offsets + 2 * num_splits * split_stride, mask=mask, other=0)
    mean_hi = tl.load(partials + offset, mask=exists, other=0)
    means = tl.where(mask, split_mean_hi - mean_hi[:, None] + split_mean_lo, 0)
    mean_lo = tl.sum(counts * means, 1) / positions
    distance = means - mean_lo[:, None]
    return mean_hi, mean_lo, tl.sum(sum_sq + counts * distance * distance, 1)


@triton.jit
def combine_sum(partials, block, split_stride, channels, BLOCK_C, MAX_SPLITS):
    """Add up the sums of all splits."""
    offset, exists = partial_offsets(block, channels, BLOCK_C)
    split = tl.arange(0, MAX_SPLITS)
    mask = exists[:, None] & (split < tl.num_programs(1))[None, :]
    offsets = split[None, :] * split_stride + offset[:, None]
    return tl.sum(tl.load(partials + offsets, mask=mask, other=0), 1)
