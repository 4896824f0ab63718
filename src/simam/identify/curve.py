"""How the coefficients of z = k t + c change with the scale of an input."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import run
from .reading import Reading, solve
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


class Curve(NamedTuple):
    """Coefficients of z in each group, for inputs of several scales."""

    scales: Tensor  # [scales]
    inverse: Tensor  # 1 / k [scales, groups]
    errors: Tensor  # the relative errors of 1 / k [scales]
    offsets: Tensor  # c [scales, groups]
    curvature: Tensor  # q [scales, groups]
    sums: Tensor  # the sum of the gates [scales, groups]

    def at(self, chosen: Tensor) -> "Curve":
        """Choose some of the scales."""
        return Curve(*(each[chosen] for each in self))


def measure_curve(
    subject: Subject, reading: Reading, y: Tensor, scales: Iterable[float]
) -> Curve | None:
    """Measure the coefficients for inputs scale * y.

    Returns:
        Curve or None: the coefficients at the scales at which z is known; None if there are none,
        or if the module fails or z has another form at one of the scales.
    """
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
        if not residual <= reading.tolerance:
            return None
        largest = largest[..., 0]
        sums = group(reading.gate(x, output)).sum(-1)
        numbers = (each.flatten() for each in (largest / k, c, q / largest, sums))
        error = reading.noise / k.abs().min()
        found.append((torch.tensor(scale, dtype=z.dtype), error, *numbers))
    if not found:
        return None
    sizes, errors, inverse, offsets, curvature, sums = map(torch.stack, zip(*found, strict=True))
    return Curve(sizes, inverse, errors, offsets, curvature, sums)


class Law(NamedTuple):
    """(1 / k)^q = slope scale^(p q) + constant, in each group; p is 0 if k is constant."""

    p: int
    q: float
    slope: Tensor  # [groups]
    constant: Tensor  # [groups]
    floor: Tensor | None = None  # the constant 1 / k of small scales, if it has one [groups]


def find_law(curve: Curve) -> Law | None:
    """Find how 1 / k grows with the scale; None if it follows none of the known laws."""
    scales, inverse, errors = curve.scales, curve.inverse, curve.errors
    zero = torch.zeros_like(inverse[0])

    def fits(values: Tensor, expected: Tensor, q: float = 1.0) -> Tensor:
        allowed = 20 * q * (errors + errors[0] + errors[-1])[:, None]
        return (values - expected).abs() <= allowed * values.abs()

    if fits(inverse, inverse[:1]).all():
        return Law(0, 1.0, zero, inverse[0])
    for p, q in LAWS:
        powers, size = inverse**q, scales[:, None] ** (p * q)
        slope = (powers[-1] - powers[0]) / (size[-1] - size[0])
        constant = powers[0] - slope * size[0]
        if fits(powers, slope * size + constant, q).all():
            noise = 40 * q * errors[0] * powers[0].abs()
            constant = torch.where(constant.abs() <= noise, zero, constant)
            if (constant - constant.mean()).abs().max() <= 1e-3 * constant.mean().abs():
                return Law(p, q, slope, constant)
    # A floor: constant up to a scale that differs from group to group, affine above it.
    level = fits(inverse, inverse[:1])
    first = level.sum(0)
    if (first < 2).any() or (first > len(scales) - 3).any():
        return None
    above, start = inverse.gather(0, first[None])[0], scales[first]
    for p in (2, 1):
        size = scales[:, None] ** p
        slope = (inverse[-1] - above) / (size[-1] - start**p)
        constant = above - slope * start**p
        if (level | fits(inverse, slope * size + constant)).all():
            constant = torch.where(constant.abs() <= 1e-6 * above.abs(), zero, constant)
            return Law(p, 1.0, slope, constant, inverse[0])
    return None
