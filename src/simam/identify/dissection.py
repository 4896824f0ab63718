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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import probes
from .layout import Axes, Layout, affected, is_product, run
from .reading import CENTRES, PRODUCTS, SUMS, Reading, read, solve, subsets
from .subject import ProbeError, Subject

# What stands in the place of v + lambda, by p and q: (1 / k)^q is affine in scale^(p q).
LAWS: Mapping[tuple[int, float], str] = {
    (2, 1.0): "variance",
    (1, 1.0): "standard deviation",
    (1, 2.0): "root of the sum",
    (2, 0.5): "square of the sum",
    (4, 0.5): "square of variance plus lambda",
    (4, 1.0): "squared variance",
}


@dataclass(frozen=True)
class Facts:
    """The parts of a module; see the docstring of this file.

    Attributes:
        reading (Reading): how output, gate and z are made.
        softmax (bool): whether the gates of a group add up to 1.
        law (str): a value of `LAWS`; "none" if k is a constant.
        spread (str), spread_axes (Axes): v is a mean of the squares of deviations from this.
        divisor (str): what the sum of these squares is divided by.
        others (bool): whether m is the mean of the other neurons.
        factor (float): f.
        e_lambda (float or None): lambda; 0 if there is none, None if it varies.
        divided (bool): whether lambda is divided as the sum of squares is.
        floor (float or None): the least v.
        offset (float), small_offset (float): c if v is far above lambda, and far below.
        pooled (str): "sum" or "average" if t is that of a group.
    """

    reading: Reading
    softmax: bool
    law: str
    spread: str
    spread_axes: Axes
    divisor: str
    others: bool
    factor: float
    e_lambda: float | None
    divided: bool
    floor: float | None
    offset: float
    small_offset: float
    pooled: str = ""


def dissect(subject: Subject, precision: float) -> list[Facts]:
    """Return every description of a module that explains its outputs."""
    product = is_product(subject)
    layout = affected(subject, next(iter((PRODUCTS if product else SUMS).values())), precision)
    if not layout.regular or not layout.axes:
        return []
    for readings in read(subject, layout, product=product, precision=precision):
        found = [
            (_pooled if reading.power == "constant" else _measure)(subject, reading)
            for reading in readings
        ]
        if any(found):
            return [facts for facts in found if facts]
    return []


class _Curve(NamedTuple):
    """Coefficients of z in each group, for inputs of several scales."""

    scales: Tensor  # [scales]
    inverse: Tensor  # 1 / k [scales, groups]
    errors: Tensor  # the relative errors of 1 / k [scales]
    offsets: Tensor  # c [scales, groups]
    curvature: Tensor  # q [scales, groups]
    sums: Tensor  # the sum of the gates [scales, groups]


def _curve(
    subject: Subject, reading: Reading, y: Tensor, scales: Iterable[float]
) -> _Curve | None:
    """Measure the coefficients for inputs scale * y; None if the module fails, or z is unknown."""
    group = partial(reading.layout.group, axes=reading.axes)
    found = []
    for scale in scales:
        x = scale * y
        try:
            output = run(subject, x)
        except ProbeError:
            return None
        z, known, t = map(group, (*reading.decode(x, output), reading.deviation(x)))
        if (known.sum(-1) < 3).any():
            continue
        largest = (t * known).abs().amax(-1, keepdim=True)
        t, one = t / largest, torch.ones_like(t)
        q = torch.zeros_like(t[..., 0])
        if reading.power == "leave-one-out":
            (k, c, q), residual = solve([t, one, -z * t], z, known)
            k = k - c * q
        else:
            (k, c), residual = solve([t, one], z, known)
        if residual <= reading.tolerance:
            largest = largest[..., 0]
            sums = group(reading.gate(x, output)).sum(-1)
            error = 1e4 * reading.precision / k.abs().min()
            numbers = (largest / k, c, q / largest, sums)
            found.append((error, *(each.flatten() for each in numbers), torch.tensor(scale, dtype=z.dtype)))
    if not found:
        return None
    errors, inverse, offsets, curvature, sums, sizes = map(torch.stack, zip(*found, strict=True))
    return _Curve(sizes, inverse, errors, offsets, curvature, sums)


class _Law(NamedTuple):
    """(1 / k)^q = slope scale^(p q) + constant, in each group; the slope is 0 if p is."""

    p: int
    q: float
    slope: Tensor  # [groups]
    constant: Tensor  # [groups]
    floor: Tensor | None = None  # 1 / k where it no longer falls with the scale [groups]


def _measure(subject: Subject, reading: Reading) -> Facts | None:
    curve = _curve(subject, reading, probes.pattern(subject.shape), probes.SCALES)
    if curve is None:
        return None
    noise = 1e4 * reading.precision
    usable = curve.errors < noise ** (2 / 3)
    if usable.sum() < 3:
        return None
    offsets = (curve.offsets[usable][-1], curve.offsets[0])
    softmax = reading.link == "exp" and bool(((curve.sums - 1).abs() < 1e-3).all())
    if not softmax and not all(_same(each, reading) for each in offsets):
        return None
    law = _find_law(curve, usable)
    if law is None:
        return None
    top = float(curve.scales[usable][-1])
    if reading.power == "leave-one-out" and not _excludes_the_neuron(subject, reading, curve, top):
        return None
    spread = _find_spread(subject, reading, law, curve, usable)
    return spread and replace(
        spread,
        softmax=softmax,
        offset=float(offsets[0].median()),
        small_offset=float(offsets[1].median()),
    )


def _same(values: Tensor, reading: Reading) -> bool:
    return bool((values - values.median()).abs().max() < 300 * reading.tolerance)


def _find_law(curve: _Curve, usable: Tensor) -> _Law | None:
    scales, inverse, errors = (each[usable] for each in (curve.scales, curve.inverse, curve.errors))
    zero = torch.zeros_like(inverse[0])

    def fits(values: Tensor, expected: Tensor, q: float = 1.0) -> Tensor:
        allowed = 20 * q * (errors + errors[0] + errors[-1])[:, None]
        return (values - expected).abs() <= allowed * values.abs()

    if fits(inverse, inverse[:1]).all():
        return _Law(0, 1.0, zero, inverse[0])
    for p, q in LAWS:
        powers, size = inverse**q, scales[:, None] ** (p * q)
        slope = (powers[-1] - powers[0]) / (size[-1] - size[0])
        constant = powers[0] - slope * size[0]
        if fits(powers, slope * size + constant, q).all():
            small = 40 * q * errors[0] * powers[0].abs()
            constant = torch.where(constant.abs() <= small, zero, constant)
            if (constant - constant.mean()).abs().max() <= 1e-3 * constant.mean().abs():
                return _Law(p, q, slope, constant)
    # A floor: constant below a scale that differs from group to group, affine above it.
    level = fits(inverse, inverse[:1])
    first = level.sum(0)
    if (first < 2).any() or (first > len(scales) - 3).any():
        return None
    above, at = inverse.gather(0, first[None])[0], scales[first]
    for p in (2, 1):
        size = scales[:, None] ** p
        slope = (inverse[-1] - above) / (size[-1] - at**p)
        constant = above - slope * at**p
        if (level | fits(inverse, slope * size + constant)).all():
            constant = torch.where(constant.abs() <= 1e-6 * above.abs(), zero, constant)
            return _Law(p, 1.0, slope, constant, inverse[0])
    return None


def _excludes_the_neuron(
    subject: Subject, reading: Reading, curve: _Curve, scale: float
) -> bool:
    """Whether v is that of the other neurons: then q is -r / S with r = M / (M - 1)."""
    x = scale * probes.pattern(subject.shape)
    rows = reading.layout.group(x, reading.axes)
    sum_sq = (rows - rows.mean(-1, keepdim=True)).square().sum(-1).flatten()
    m = rows.shape[-1]
    at = int((curve.scales == scale).nonzero())
    return bool((curve.curvature[at] * sum_sq * (m - 1) / m + 1).abs().max() < 1e-3)


class _Sample(NamedTuple):
    """One shape of input: its pattern, and the law of 1 / k in its groups."""

    y: Tensor
    slope: Tensor
    constant: Tensor


def _find_spread(
    subject: Subject, reading: Reading, law: _Law, curve: _Curve, usable: Tensor
) -> Facts | None:
    """Find which statistic, divided by which number, explains 1 / k on maps of several sizes."""
    facts = partial(Facts, reading, softmax=False, floor=None, offset=0.0, small_offset=0.0)
    if law.p == 0:
        factor = float(law.constant.median())
        if not _same(law.constant / factor, reading):
            return None
        return facts(
            law="none", spread="mean", spread_axes=reading.axes, divisor="M - 1", others=False,
            factor=factor, e_lambda=0.0, divided=False,
        )  # fmt: skip
    samples = [_Sample(probes.pattern(subject.shape), law.slope, law.constant)]
    top = float(curve.scales[usable][-1])
    ratio = (law.constant / curve.inverse[usable] ** law.q - 0.5).abs().amax(1)
    middle = float(curve.scales[usable][ratio.argmin()])
    for shape in _other_shapes(subject.shape, reading.layout):
        y = probes.pattern(shape)
        other = _curve(subject, reading, y, dict.fromkeys((middle, top)))
        if other is not None and len(other.scales) == (1 if middle == top else 2):
            powers = other.inverse**law.q
            size = other.scales[:, None] ** (law.p * law.q)
            if law.constant.any() and law.floor is None:
                slope = (powers[-1] - powers[0]) / (size[-1] - size[0])
                constant = powers[0] - slope * size[0]
            else:
                slope, constant = powers[-1] / size[-1], torch.zeros_like(powers[-1])
            samples.append(_Sample(y, slope, constant))

    best = None
    slopes = torch.cat([each.slope for each in samples]) ** (1 / law.q)
    for axes in subsets(reading.layout.axes):
        if not set(axes) >= set(reading.axes):  # v is the same in a group
            continue
        counts = [_divisors(reading.layout, axes, each.y.shape) for each in samples]
        numbers = torch.cat(
            [
                torch.tensor(list(count.values())).double()[:, None].expand(-1, len(each.slope))
                for count, each in zip(counts, samples, strict=True)
            ],
            dim=1,
        )
        ratios = torch.cat([_ratio(reading, each, axes) for each in samples])
        for spread in _SPREADS:
            sums = torch.cat([_sums(reading, each.y, axes, spread) for each in samples])
            for others in (False, True):
                if others and (reading.centre, reading.centre_axes) != ("mean", axes):
                    continue
                factors = slopes * ratios ** (2 * others) * (numbers / sums) ** (law.p / 2)
                middle = factors.median(1, keepdim=True).values
                errors = (factors / middle - 1).abs().amax(1)
                for divisor, error, factor in zip(counts[0], errors, middle[:, 0], strict=True):
                    if error <= 1e5 * reading.tolerance:
                        is_usual = abs(float(factor) - 4) < 1e-3
                        rank = (not is_usual, (reading.power == "leave-one-out") != others)
                        if best is None or rank < best[0]:
                            best = rank, axes, spread, divisor, others, float(factor)
    if best is None:
        return None
    _, axes, spread, divisor, others, factor = best
    number = 4 / factor
    if divisor == "1" and abs(number - round(number)) < 1e-3 < number - 1:
        divisor, factor = str(round(number)), 4.0
    constants = [
        each.constant * _ratio(reading, each, axes) ** (2 * law.q * others) for each in samples
    ]
    lambdas = [float(each.median()) / factor**law.q for each in constants]
    divided_by = [
        _divisors(reading.layout, axes, each.y.shape).get(divisor, number) for each in samples
    ]
    if law.floor is not None:
        lambdas, divided_by = lambdas[:1], divided_by[:1]

    def agree(values: list[float]) -> bool:
        return max(values) - min(values) <= 1e-3 * abs(values[0])

    divided = not agree(lambdas) and agree([a * b for a, b in zip(lambdas, divided_by, strict=True)])
    e_lambda = lambdas[0] * (divided_by[0] if divided else 1)
    return replace(
        facts(
            law=LAWS[law.p, law.q], spread=spread, spread_axes=axes, divisor=divisor, others=others,
            factor=factor, e_lambda=e_lambda if divided or agree(lambdas) else None, divided=divided,
        ),
        floor=None if law.floor is None else float(law.floor.median()) / factor - e_lambda,
    )  # fmt: skip


_SPREADS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{
        name: lambda rows, centre=centre: (rows - centre(rows)[..., None]).square().sum(-1)
        for name, centre in CENTRES.items()
    },
    "largest": lambda rows: (rows - rows.mean(-1, keepdim=True)).square().amax(-1),
    "absolute": lambda rows: _square_of_sum((rows - rows.mean(-1, keepdim=True)).abs()),
}


def _square_of_sum(rows: Tensor) -> Tensor:
    # Divided by M, as a sum of squares is, this is the square of the mean.
    return rows.sum(-1) * rows.mean(-1)


def _sums(reading: Reading, y: Tensor, axes: Axes, spread: str) -> Tensor:
    """The sum of squares in v [groups]."""
    values = reading.layout.reduce(_SPREADS[spread], y, axes)
    return reading.layout.group(values, reading.axes)[..., 0].flatten()


def _ratio(reading: Reading, sample: _Sample, axes: Axes) -> Tensor:
    """M / (M - 1), by which a deviation from the mean of the others is larger [groups]."""
    m = reading.layout.count(sample.y.shape, axes)
    return torch.full_like(sample.slope, m / (m - 1))


def _divisors(layout: Layout, axes: Axes, shape: Sequence[int]) -> dict[str, float]:
    """What a sum over a group may be divided by, by name."""
    m = layout.count(shape, axes)
    divisors: dict[str, float] = {"M - 1": m - 1, "M": m, "M - 2": m - 2, "M + 1": m + 1, "1": 1}
    names = _axis_names(len(shape))
    single = [axis for axis in range(len(shape)) if axis > 0 or 0 in axes]
    products = [(axis,) for axis in single] + [(axis, axis) for axis in single]
    products += [tuple(range(2, len(shape))), tuple(range(1, len(shape)))]
    for product in products:
        size = math.prod(shape[axis] for axis in product)
        name = " * ".join(names[axis] for axis in product)
        divisors |= {name: size, f"{name} - 1": size - 1}
    return divisors


def _axis_names(rank: int) -> tuple[str, ...]:
    return ("N", "C", *{3: ("L",), 4: ("H", "W"), 5: ("T", "H", "W")}[rank])


def _other_shapes(shape: tuple[int, ...], layout: Layout) -> list[tuple[int, ...]]:
    """Shapes that differ along the axes of the groups, as far as these are whole axes."""
    found = []
    for change in ((3, -1), (-1, 2), (2, 3), (1, -2), (5, 1)):
        new = list(shape)
        for i, axis in enumerate(axis for axis in layout.axes if layout.full[axis]):
            new[axis] += change[i % 2] if axis > 0 else 1
        found.append(tuple(new))
    return [each for each in found if each != shape and min(each) > 0]


def _pooled(subject: Subject, reading: Reading) -> Facts | None:
    """Describe a gate that is the same in a whole group, since t is summed over the group."""
    y = probes.pattern(subject.shape)
    layout, axes = reading.layout, reading.axes
    scales, values = [], []
    for scale in probes.SCALES:
        z, known = reading.decode(scale * y, run(subject, scale * y))
        if known.all():
            scales.append(scale)
            values.append(layout.group(z, axes)[..., 0].flatten())
    if len(values) < 3:
        return None
    z = torch.stack(values)
    rows = layout.group(y, axes)
    m = rows.shape[-1]
    sum_sq = (rows - rows.mean(-1, keepdim=True)).square().sum(-1).flatten()
    low, high = z[0], z[-1]
    if (high - low).abs().min() < 1e-3:
        return None
    middle = int(((z - low) / (high - low) - 0.5).abs().amax(1).argmin())
    share = (z[middle] - low) / (high - low)  # v / (v + lambda)
    found = []
    for (pooled, count), (divisor, number) in itertools.product(
        {"sum": 1, "average": m}.items(), {"M - 1": m - 1, "M": m, "1": 1}.items()
    ):
        factor = number / count / float((high - low).median())
        e_lambda = float((scales[middle] ** 2 * sum_sq / number * (1 / share - 1)).median())
        v = torch.tensor(scales, dtype=z.dtype)[:, None] ** 2 * sum_sq / number
        expected = low + (high - low) * v / (v + e_lambda)
        if (z - expected).abs().max() <= 300 * reading.tolerance:
            found.append((factor, pooled, divisor, e_lambda))
    if not found:
        return None
    # One map cannot tell a factor from a divisor, so the plainest pair is taken.
    factor, pooled, divisor, e_lambda = min(found, key=lambda f: (abs(f[0] - 4) > 0.01, abs(f[0] - 1) > 0.01))
    return Facts(
        reading, softmax=False, law="variance", spread="mean", spread_axes=axes, divisor=divisor,
        others=False, factor=factor, e_lambda=e_lambda, divided=False, floor=None,
        offset=float(low.median()), small_offset=float(low.median()), pooled=pooled,
    )  # fmt: skip
