"""What a module computes, measured on its outputs, where it computes neither of the closed forms.

Copies of SimAM have a structure in common: output and gate, and a function, such as the sigmoid, of

    z = k t + c,    t = (x - m)^2,    1 / k = f (v + lambda),

where the centre m, such as the mean, and the spread v, such as the variance, are statistics of a
group of neurons, such as a channel. Each part is measured by itself: which neurons affect a gate
(`layout`); under which function z is a polynomial of x within a group, and so m, k and c
(`reading`); how 1 / k grows with the scale of x, and so f and lambda; which statistic v is, on maps
of several sizes. Each part that differs from the paper is a deviation, and a module may have
several.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from . import probes
from .curve import LAWS, find_law, measure_curve
from .layout import affected, is_product, run
from .reading import PRODUCTS, SUMS, Reading, read
from .spread import Spread, find_spread
from .subject import Subject


@dataclass(frozen=True)
class Facts:
    """The parts of a module; see the docstring of this file.

    Attributes:
        reading (Reading): how output, gate and z are made.
        spread (Spread): v, f and lambda.
        law (str): a value of `LAWS`: what stands for v + lambda; "none" if k is a constant.
        offset (float), small_offset (float): c if v is far above lambda, and far below.
        softmax (bool): whether the gates of a group add up to 1.
        pooled (str): "sum" or "average" if t is that of the whole group.
    """

    reading: Reading
    spread: Spread
    law: str
    offset: float
    small_offset: float
    softmax: bool = False
    pooled: str = ""


def dissect(subject: Subject, precision: float) -> list[Facts]:
    """Return every description of a module that explains its outputs."""
    product = is_product(subject)
    layout = affected(subject, next(iter((PRODUCTS if product else SUMS).values())), precision)
    if not layout.regular or not layout.axes:
        return []
    seen: list[tuple[object, ...]] = []
    for readings in read(subject, layout, product=product, precision=precision):
        found = []
        for reading in readings:
            if reading.kind in seen:  # on inputs of another size
                continue
            seen.append(reading.kind)
            measure = _measure_pooled if reading.power == "constant" else _measure
            facts = measure(subject, reading)
            if facts is not None:
                found.append(facts)
        if found:
            return found
    return []


def _measure(subject: Subject, reading: Reading) -> Facts | None:
    curve = measure_curve(subject, reading, probes.pattern(subject.shape), probes.SCALES)
    if curve is None:
        return None
    exact = curve.at(curve.errors < reading.noise ** (2 / 3))
    if len(exact.scales) < 3:
        return None
    offset, small_offset = exact.offsets[-1], curve.offsets[0]
    softmax = reading.link == "exp" and bool(((curve.sums - 1).abs() < 1e-3).all())
    if not softmax and not (reading.is_same(offset) and reading.is_same(small_offset)):
        return None
    law = find_law(exact)
    if law is None:
        return None
    if reading.power == "leave-one-out":
        # Then v is that of the other neurons: q = -r / S with r = M / (M - 1), up to lambda.
        rows = reading.layout.group(probes.pattern(subject.shape), reading.axes)
        sum_sq = exact.scales[-1] ** 2 * rows.var(-1, correction=0).flatten() * rows.shape[-1]
        ratio = rows.shape[-1] / (rows.shape[-1] - 1)
        if (exact.curvature[-1] * sum_sq / ratio + 1).abs().max() > 1e-3:
            return None
    spread = find_spread(subject, reading, law, exact)
    if spread is None:
        return None
    name = LAWS.get((law.p, law.q), "none")
    large, small = float(offset.median()), float(small_offset.median())
    return Facts(reading, spread, name, large, small, softmax=softmax)


def _measure_pooled(subject: Subject, reading: Reading) -> Facts | None:
    """Describe a gate that is the same in a whole group, since t is summed over the group."""
    y = probes.pattern(subject.shape)
    group = partial(reading.layout.group, axes=reading.axes)
    scales, values = [], []
    for scale in probes.SCALES:
        z, known = reading.decode(scale * y, run(subject, scale * y))
        if known.all():
            scales.append(scale)
            values.append(group(z)[..., 0].flatten())
    if len(values) < 3:
        return None
    z, size = torch.stack(values), torch.tensor(scales, dtype=y.dtype)[:, None]
    # At small scales z grows with the square of the scale, which is known, so it shows z at 0.
    low, high = z[0] - (z[1] - z[0]) / ((size[1] / size[0]) ** 2 - 1), z[-1]
    if (high - low).abs().min() < 1e-3:
        return None
    rows = group(y)
    m = rows.shape[-1]
    sum_sq = rows.var(-1, correction=0).flatten() * m
    share = (z - low) / (high - low)  # v / (v + lambda)
    middle = int((share - 0.5).abs().amax(1).argmin())
    found = []
    for (pooled, count), (divisor, number) in itertools.product(
        {"sum": 1, "average": m}.items(), {"M - 1": m - 1, "M": m, "1": 1}.items()
    ):
        v = size**2 * sum_sq / number
        e_lambda = float((v[middle] * (1 / share[middle] - 1)).median())
        if reading.is_same(z - low - (high - low) * v / (v + e_lambda), 0.0):
            factor = number / count / float((high - low).median())
            spread = Spread("mean", reading.axes, divisor, False, factor, e_lambda)
            offset = float(low.median())
            found.append(Facts(reading, spread, "variance", offset, offset, pooled=pooled))
    # One map cannot tell a factor from a divisor, so the plainest pair counts.
    plain = (4.0, 1.0)
    return min(
        found,
        key=lambda facts: [abs(abs(facts.spread.factor) - each) > 0.01 for each in plain],
        default=None,
    )
