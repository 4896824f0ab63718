"""Which statistic of a group v is, on maps of several sizes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import probes
from .curve import Curve, Law, measure_curve
from .layout import Axes, Layout
from .reading import CENTRES, Reading, subsets
from .subject import Subject


def _around(centre: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: (rows - centre(rows)[..., None]).square().sum(-1)


def _largest(rows: Tensor) -> Tensor:
    return (rows - rows.mean(-1, keepdim=True)).square().amax(-1)


def _absolute(rows: Tensor) -> Tensor:
    # Divided by M, as the other sums are, this is the square of the mean absolute deviation.
    distance = (rows - rows.mean(-1, keepdim=True)).abs()
    return distance.sum(-1) * distance.mean(-1)


# What is divided to give v: a sum of squares of the deviations from a centre, or another number.
_SUMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{name: _around(centre) for name, centre in CENTRES.items()},
    "largest": _largest,
    "absolute": _absolute,
}


@dataclass(frozen=True)
class Spread:
    """v, f and lambda in 1 / k = f (v + lambda).

    Attributes:
        name (str): a key of `CENTRES`, if v is a mean of squares of deviations from this centre;
            "largest" or "absolute" for the largest square and the mean absolute deviation.
        axes (Axes): the axes of the group whose statistic v is.
        divisor (str): what the sum of squares is divided by.
        others (bool): whether the deviation is from the mean of the other neurons.
        factor (float): f.
        e_lambda (float or None): lambda; 0 if there is none, None if it varies with the map.
        divided (bool): whether lambda is divided as the sum of squares is.
        floor (float or None): the least v.
    """

    name: str
    axes: Axes
    divisor: str
    others: bool
    factor: float
    e_lambda: float | None
    divided: bool = False
    floor: float | None = None


class _Sample(NamedTuple):
    """A map, and the law of 1 / k in its groups."""

    y: Tensor
    slope: Tensor
    constant: Tensor


class _Choice(NamedTuple):
    name: str
    axes: Axes
    divisor: str
    others: bool
    factor: float


def find_spread(subject: Subject, reading: Reading, law: Law, curve: Curve) -> Spread | None:
    """Find the statistic that explains 1 / k on maps of several sizes; None if none does."""
    if law.p == 0:
        factor = float(law.constant.median())
        if not reading.is_same(law.constant / factor):
            return None
        return Spread("mean", reading.axes, "M - 1", False, factor, 0.0)
    samples = [_Sample(probes.pattern(subject.shape), law.slope, law.constant)]
    samples += _other_samples(subject, reading, law, curve)
    choices = _choices(reading, law, samples)
    is_rare = reading.power == "leave-one-out"
    choice = min(
        choices, key=lambda c: (abs(abs(c.factor) - 4) > 1e-3, c.others != is_rare), default=None
    )
    return choice and _with_lambda(reading, law, samples, choice)


def _other_samples(subject: Subject, reading: Reading, law: Law, curve: Curve) -> Iterator[_Sample]:
    """Maps of other sizes, measured where lambda does not matter and where it matters most."""
    top = float(curve.scales[-1])
    share = law.constant / curve.inverse**law.q
    middle = float(curve.scales[(share - 0.5).abs().amax(1).argmin()])
    scales = dict.fromkeys((middle, top))
    for shape in _other_shapes(subject.shape, reading.layout):
        y = probes.pattern(shape)
        other = measure_curve(subject, reading, y, scales)
        if other is None or len(other.scales) < len(scales):
            continue
        powers, size = other.inverse**law.q, other.scales[:, None] ** (law.p * law.q)
        if law.constant.any() and law.floor is None:
            slope = (powers[-1] - powers[0]) / (size[-1] - size[0])
            yield _Sample(y, slope, powers[0] - slope * size[0])
        else:
            yield _Sample(y, powers[-1] / size[-1], torch.zeros_like(powers[-1]))


def _choices(reading: Reading, law: Law, samples: Sequence[_Sample]) -> Iterator[_Choice]:
    """The statistics for which f is the same in all groups of all maps."""
    slopes = torch.cat([each.slope for each in samples]) ** (1 / law.q)
    for axes in subsets(reading.layout.axes):
        if not set(axes) >= set(reading.axes):  # v is the same in a group
            continue
        divisors = [_divisors(reading.layout, axes, each.y.shape) for each in samples]
        counts = [
            torch.tensor(list(each.values())).double()[:, None].expand(-1, len(sample.slope))
            for each, sample in zip(divisors, samples, strict=True)
        ]
        count = torch.cat(counts, dim=1)
        ratio = torch.cat([_ratio(reading, each, axes) for each in samples])
        for name in _SUMS:
            sums = torch.cat([_sums(reading, each.y, axes, name) for each in samples])
            for others in (False, True):
                if others and (reading.centre, reading.centre_axes) != ("mean", axes):
                    continue
                factors = slopes * ratio ** (2 * others) * (count / sums) ** (law.p / 2)
                middle = factors.median(1).values
                errors = (factors / middle[:, None] - 1).abs().amax(1)
                for divisor, factor, error in zip(divisors[0], middle, errors, strict=True):
                    if error <= 1e5 * reading.tolerance:
                        yield _plainest(_Choice(name, axes, divisor, others, float(factor)))


def _plainest(choice: _Choice) -> _Choice:
    """Read a factor of 4 / 48 as a division by 48, whatever the size of the map."""
    number = 4 / choice.factor
    if choice.divisor == "1" and abs(number - round(number)) < 1e-3 < number - 1:
        return choice._replace(divisor=str(round(number)), factor=4.0)
    return choice


def _with_lambda(reading: Reading, law: Law, samples: Sequence[_Sample], choice: _Choice) -> Spread:
    name, axes, divisor, others, factor = choice
    if law.floor is not None:
        samples = samples[:1]
    lambdas, counts = [], []
    for each in samples:
        ratio = _ratio(reading, each, axes) ** (2 * law.q * others)
        lambdas.append(float((each.constant * ratio).median()) / factor**law.q)
        number = _divisors(reading.layout, axes, each.y.shape).get(divisor)
        counts.append(float(divisor) if number is None else number)
    multiplied = [a * b for a, b in zip(lambdas, counts, strict=True)]
    divided = not _agree(lambdas) and _agree(multiplied)
    e_lambda = multiplied[0] if divided else lambdas[0] if _agree(lambdas) else None
    floor = None
    if law.floor is not None and e_lambda is not None:
        least = float(law.floor.median()) / factor - e_lambda
        floor = least if law.p == 2 else least**2
    return Spread(name, axes, divisor, others, factor, e_lambda, divided, floor)


def _agree(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-3 * abs(values[0])


def _sums(reading: Reading, y: Tensor, axes: Axes, name: str) -> Tensor:
    """What is divided to give v [groups]."""
    values = reading.layout.reduce(_SUMS[name], y, axes)
    return reading.layout.group(values, reading.axes)[..., 0].flatten()


def _ratio(reading: Reading, sample: _Sample, axes: Axes) -> Tensor:
    """M / (M - 1), by which a deviation from the mean of the others is larger [groups]."""
    m = reading.layout.count(sample.y.shape, axes)
    return torch.full_like(sample.slope, m / (m - 1))


def _divisors(layout: Layout, axes: Axes, shape: Sequence[int]) -> dict[str, float]:
    """What a sum over a group may be divided by, by name."""
    m = layout.count(shape, axes)
    divisors: dict[str, float] = {"M - 1": m - 1, "M": m, "M - 2": m - 2, "M + 1": m + 1, "1": 1}
    rank = len(shape)
    names = ("N", "C", *{3: ("L",), 4: ("H", "W"), 5: ("T", "H", "W")}[rank])
    products: list[tuple[int, ...]] = [tuple(range(2, rank)), tuple(range(1, rank))]
    for axis in range(0 if 0 in axes else 1, rank):
        products += [(axis,), (axis, axis)]
    for product in products:
        size = math.prod(shape[axis] for axis in product)
        name = " * ".join(names[axis] for axis in product)
        divisors |= {name: size, f"{name} - 1": size - 1}
    return divisors


def _other_shapes(shape: tuple[int, ...], layout: Layout) -> list[tuple[int, ...]]:
    """Shapes that differ along the axes of the groups, as far as these are whole axes."""
    found = []
    for change in ((3, -1), (-1, 2), (2, 3), (1, -2), (5, 1)):
        new = list(shape)
        for i, axis in enumerate(axis for axis in layout.axes if layout.full[axis]):
            new[axis] += change[i % 2] if axis > 0 else 1
        found.append(tuple(new))
    return [each for each in found if each != shape]
