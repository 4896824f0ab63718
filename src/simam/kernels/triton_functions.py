"""What the GPU kernels are made of: tiles, arithmetic, moments and sums; in Triton.

A tile is CHANNELS channels by POSITIONS positions. In rows the positions of a channel are
neighbours in memory; in strips (channels last) the channels of a position are. A block of channels
is numbered from the first of the first sample on; rows count as those of one sample.

The mathematics is that of `reference`. With u = 1 / e* - 1/2, the gate s = sigmoid(u + 1/2), the
gradient g of the output and v = g t s (1 - s), the gradient of the input is
g s + v u_d + 2 d sum(v u_S) - mean(v u_d), where u_d and u_S are the derivatives of u.
"""

import triton
import triton.language as tl


@triton.jit
def tile(block, start, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS):
    """Where a tile lies and, from there, its elements; which of them exist.

    Divided and multiplied by ALIGN, what neighbours in memory end at stays the same, and the
    compiler knows how many of them it may take at once.
    """
    sample, channel = first_channel(block, channels, CHANNELS)
    c, p = tl.arange(0, CHANNELS), tl.arange(0, POSITIONS)
    if STRIPS:
        pitch = channels // ALIGN * ALIGN
        base = (sample * positions + start) * pitch + channel
        offsets = c[:, None] + p[None, :] * pitch
        mask = (c < pitch - channel)[:, None] & (p < positions - start)[None, :]
    else:
        pitch = positions // ALIGN * ALIGN
        base = channel * pitch + start
        offsets = c[:, None] * pitch + p[None, :]
        mask = (c < channels - channel)[:, None] & (p < pitch - start)[None, :]
    return base, offsets, mask


@triton.jit
def first_channel(block, channels, CHANNELS):
    """The sample of a block of channels, and the first of them."""
    blocks = tl.cdiv(channels, CHANNELS)
    return (block // blocks).to(tl.int64), (block % blocks).to(tl.int64) * CHANNELS


@triton.jit
def load(pointer, base, offsets, mask):
    """The elements of a tile in float32, and zeros for those that do not exist."""
    return tl.load(pointer + base + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit
def deviations(t, mask, positions):
    """The deviations of whole channels from their means, and their squares' sums.

    Twice: the rounding of a large mean shows in the gate otherwise. What does not exist counts
    as zero only after the mean is taken off.
    """
    mean = tl.sum(t, 1) / positions
    d = tl.where(mask, t - mean[:, None], 0)
    shift = tl.sum(d, 1) / positions
    d = tl.where(mask, d - shift[:, None], 0)
    return d, tl.sum(d * d, 1)


@triton.jit
def energy(d, total, positions, e_lambda, LEAVE_ONE_OUT):
    """The u of deviations, and u_d and u_S, the latter two but for a factor of their channel."""
    others = tl.maximum(positions - 1, 1).to(tl.float32)
    if LEAVE_ONE_OUT:
        shift = d * (positions / others)
        # Where one neuron holds nearly all of S the difference cancels, to below zero by rounding.
        rest = tl.maximum(total[:, None] - d * shift, 0)
        variance = rest / others + e_lambda
        ratio = shift / variance
        u = shift * ratio * 0.25
        u_d = ratio * (positions + shift * ratio)
        u_total = u / variance
        of_deviation = tl.zeros_like(total) + 0.5 / others
        of_total = tl.zeros_like(total) - 1 / others
    else:
        # A lambda that float32 cannot hold must not make 0 / 0 of a constant channel, nor may
        # four times the quotient be infinite.
        q = tl.minimum(0.25 / (total / others + e_lambda), 1e37)
        u = d * d * q[:, None]
        u_d = d
        u_total = u
        of_deviation = 2 * q
        of_total = -4 * q / others
    return u, u_d, u_total, of_deviation, of_total


@triton.jit
def gate(u):
    """The factor that SimAM scales a neuron by."""
    return 1 / (1 + tl.exp(-u - 0.5))


@triton.jit
def pull(t, g, u, u_d, u_total, of_deviation):
    """The first two terms of the gradient, and v u_d and v u_S but for their factors."""
    e = tl.exp(-u - 0.5)
    s = 1 / (1 + e)
    v = g * t * s * (e * s)
    return g * s + of_deviation[:, None] * (v * u_d), v * u_d, v * u_total


@triton.jit
def settle(terms, d, of_deviation, of_total, sum_d, sum_total, positions):
    """The gradient, of its first two terms and the sums."""
    slope = 2 * of_total * sum_total
    mean = of_deviation * sum_d / positions
    return terms + slope[:, None] * d - mean[:, None]


@triton.jit
def find_moments(x, block, start, stop, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS):
    """A centre, the mean's distance from it, and the squares' sum, of a part of the channels.

    Every lane keeps its own mean and squares (Welford), which are merged once (Chan, Golub and
    LeVeque). The centre, the first tile's mean, keeps the digits that a large mean would take.
    """
    base, offsets, mask = tile(
        block, start, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
    )
    centre = tl.sum(load(x, base, offsets, mask), 1) / tl.minimum(stop - start, POSITIONS)
    mean = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    seen = 0.0
    for first in range(start, stop, POSITIONS):
        base, offsets, mask = tile(
            block, first, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
        t = load(x, base, offsets, mask) - centre[:, None]
        seen += 1
        delta = tl.where(mask, t - mean, 0)
        mean += delta * (1 / seen)
        squares += delta * (t - mean)
    lane = tl.arange(0, POSITIONS)
    counts = ((stop - start + POSITIONS - 1 - lane) // POSITIONS).to(tl.float32)[None, :]
    count = (stop - start).to(tl.float32)
    shift = tl.sum(counts * mean, 1) / count
    distance = mean - shift[:, None]
    return centre, shift, tl.sum(squares + counts * distance * distance, 1)


@triton.jit
def find_sums(
    x, gradient, block, start, stop, centre, shift, total, channels, positions, e_lambda,
    LEAVE_ONE_OUT, STRIPS, ALIGN, CHANNELS, POSITIONS,
):  # fmt: skip
    """The sums of v u_d and v u_S over a part of the channels, but for their factors."""
    sum_d = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    sum_total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for first in range(start, stop, POSITIONS):
        base, offsets, mask = tile(
            block, first, channels, positions, STRIPS, ALIGN, CHANNELS, POSITIONS
        )
        t, g = load(x, base, offsets, mask), load(gradient, base, offsets, mask)
        d = tl.where(mask, t - centre[:, None] - shift[:, None], 0)
        u, u_d, u_total, of_deviation, _ = energy(d, total, positions, e_lambda, LEAVE_ONE_OUT)
        _, v_d, v_total = pull(t, g, u, u_d, u_total, of_deviation)
        sum_d += v_d
        sum_total += v_total
    return tl.sum(sum_d, 1), tl.sum(sum_total, 1)


@triton.jit
def span_of_part(positions, steps, POSITIONS):
    """The positions of this program, which are so many tiles, or what is left of them."""
    start = tl.program_id(1).to(tl.int64) * steps * POSITIONS
    return start, tl.minimum(start + steps * POSITIONS, positions)


@triton.jit
def columns(block, channels, CHANNELS):
    """The columns of `found` that belong to a block of channels, and which of them exist."""
    sample, channel = first_channel(block, channels, CHANNELS)
    channel += tl.arange(0, CHANNELS)
    return sample * channels + channel, channel < channels


@triton.jit
def found_moments(found, block, steps, width, channels, positions, CHANNELS, POSITIONS, PARTS):
    """The moments of whole channels, of those that the parts have found."""
    column, exists = columns(block, channels, CHANNELS)
    parts = tl.num_programs(1)
    part = tl.arange(0, PARTS)
    mask = exists[:, None] & (part < parts)[None, :]
    length = steps * POSITIONS
    counts = tl.minimum(positions - part.to(tl.int64) * length, length)
    counts = tl.where(part < parts, counts, 0).to(tl.float32)[None, :]
    place = part[None, :] * width + column[:, None]
    centres = tl.load(found + place, mask=mask, other=0)
    shifts = tl.load(found + place + parts * width, mask=mask, other=0)
    squares = tl.load(found + place + 2 * parts * width, mask=mask, other=0)
    centre = tl.load(found + column, mask=exists, other=0)
    means = tl.where(mask, centres - centre[:, None] + shifts, 0)
    shift = tl.sum(counts * means, 1) / positions
    distance = means - shift[:, None]
    return centre, shift, tl.sum(squares + counts * distance * distance, 1)


@triton.jit
def found_sum(found, block, width, channels, CHANNELS, PARTS):
    """A sum over whole channels, of those that the parts have found."""
    column, exists = columns(block, channels, CHANNELS)
    part = tl.arange(0, PARTS)
    mask = exists[:, None] & (part < tl.num_programs(1))[None, :]
    place = part[None, :] * width + column[:, None]
    return tl.sum(tl.load(found + place, mask=mask, other=0), 1)
