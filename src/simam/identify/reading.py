"""Reading a gate: the function by which it is a simple function of x within a group of neurons."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import probes
from .layout import Axes, Layout, run
from .subject import ProbeError, Subject

# How an output y is made from x and a gate, solved for the gate.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: y / x,
    "residual": lambda x, y: y / x - 1,
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate": lambda x, y: y,
    "sum": lambda x, y: y - x,
}
# What may stand in the place of the sigmoid: the inverse function, and the range of the gate.
LINKS: Mapping[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "sigmoid": (torch.logit, 0.0, 1.0),
    "identity": (lambda gate: gate, -math.inf, math.inf),
    "tanh": (torch.atanh, -1.0, 1.0),
    "hardsigmoid": (lambda gate: 6 * gate - 3, 0.0, 1.0),
    "softplus": (lambda gate: torch.log(torch.expm1(gate)), 0.0, math.inf),
    "exp": (torch.log, 0.0, math.inf),
}
POWERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "square": lambda d: d * d,
    "signed": lambda d: d,
    "absolute": lambda d: d.abs(),
    "signed square": lambda d: d * d.abs(),
}
CENTRES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(-1),
    "zero": lambda rows: torch.zeros_like(rows[..., 0]),
    "median": lambda rows: rows.median(-1).values,
    "maximum": lambda rows: rows.amax(-1),
    "minimum": lambda rows: rows.amin(-1),
}
_MIN_NEURONS = 5


@dataclass(frozen=True)
class Reading:
    """How to compute z from outputs, and the form that z has within a group of neurons.

    Attributes:
        output (str): a key of `PRODUCTS` or `SUMS`.
        factor (Tensor): a factor of the gate, one number or one for each channel.
        link (str): a key of `LINKS`.
        inverted (bool): whether the link is applied to 1 / z.
        shift (float): a number that is added to 1 / z.
        least (float), most (float): the ends of the range to which the gate is cut.
        layout (Layout): the neurons that affect each other.
        precision (float): the relative error of the module's arithmetic.
        axes (Axes): the axes of a group.
        power (str): z = k t + c, where t is this power of the deviation, a key of `POWERS`;
            "leave-one-out" if z = (k t + c) / (1 + q t); "constant" if z is the same in a group.
        centre (str), centre_axes (Axes): what the deviation is measured from, a key of `CENTRES`.
    """

    output: str
    factor: Tensor
    link: str
    inverted: bool
    layout: Layout
    precision: float
    shift: float = 0.0
    least: float = -math.inf
    most: float = math.inf
    axes: Axes = ()
    power: str = ""
    centre: str = "mean"
    centre_axes: Axes = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells a reading from others of the same module."""
        return self.output, self.link, self.inverted, self.axes, self.power, self.centre

    @property
    def tolerance(self) -> float:
        """The error of z where the gate is near the end of its range."""
        return float(10 * self.precision**0.6)

    @property
    def noise(self) -> float:
        """The error of z elsewhere, which is smaller."""
        return 1e4 * self.precision

    def is_same(self, values: Tensor, expected: float | None = None) -> bool:
        """Whether values of z are equal up to their errors; to each other, or to a number."""
        middle = values.median() if expected is None else expected
        return bool((values - middle).abs().max() < 300 * self.tolerance)

    def gate(self, x: Tensor, output: Tensor) -> Tensor:
        """Compute the gate, without its factor."""
        return (PRODUCTS | SUMS)[self.output](x, output) / self.factor

    def decode(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Compute z, and whether it is known: not where the gate is at the end of its range."""
        gate = self.gate(x, output)
        inverse, low, high = LINKS[self.link]
        margin = self.precision**0.4
        known = (gate > low + margin) & (gate < high - margin)
        cut = 16 * self.precision
        known &= (gate > self.least + cut) & (gate < self.most - cut)
        possible = (gate >= low) & (gate <= high)
        z = inverse(torch.where(known, gate, 0.5))
        return 1 / (z - self.shift) if self.inverted else z, known & possible.all()

    def deviation(self, x: Tensor) -> Tensor:
        """Compute t."""
        d = x - self.layout.reduce(CENTRES[self.centre], x, self.centre_axes)
        return POWERS.get(self.power, POWERS["square"])(d)


def solve(columns: list[Tensor], z: Tensor, known: Tensor) -> tuple[Tensor, float]:
    """Fit z as a sum of columns in every group, where z is known.

    Returns:
        tuple[Tensor[columns, ...], float]: the coefficients of each group, and the largest error,
        NaN if a fit is not possible.
    """
    weights = known.double()
    matrix = torch.stack(columns, -1) * weights[..., None]
    target = (z * weights)[..., None]
    q, r = torch.linalg.qr(matrix)
    solution = torch.linalg.solve_triangular(r, q.mT @ target, upper=True)
    error = (matrix @ solution - target).abs().max() / (1 + target.abs().max())
    return solution.squeeze(-1).movedim(-1, 0), float(error)


def read(
    subject: Subject, layout: Layout, *, product: bool, precision: float
) -> Iterator[list[Reading]]:
    """Yield the readings of a module under which z has a known form: the usual forms, then others.

    Args:
        subject (Subject): the module.
        layout (Layout): the neurons that affect each other.
        product (bool): whether the output is 0 where x is 0.
        precision (float): the relative error of the module's arithmetic.
    """
    y = probes.pattern(subject.shape)
    factors = _factors(subject, precision)
    drafts = [
        Reading(output, factor, link, inverted, layout, precision)
        for output, link, inverted in itertools.product(
            PRODUCTS if product else SUMS, LINKS, (False, True)
        )
        for factor in factors[output][: None if LINKS[link][2] == 1 else 1]
    ]
    for forms, size in itertools.product((_usual_forms, _rare_forms), probes.SIZES):
        try:
            output = run(subject, size * y)
        except ProbeError:
            continue
        found = [r for draft in drafts for r in _fit(draft, size * y, output, forms)]
        if found:
            yield found


def _fit(
    draft: Reading, x: Tensor, output: Tensor, forms: Callable[..., Iterator[Reading]]
) -> list[Reading]:
    """Find the readings for the largest groups in which z has a known form."""
    draft = _cut(draft, x, output)
    z, known = draft.decode(x, output)
    layout = draft.layout
    groups = subsets(layout.axes)
    if forms is _rare_forms:  # which cost more: the map, or all neurons that affect each other
        groups = [axes for axes in groups if axes == layout.axes or min(axes) >= 2]
    for axes in groups if known.any() else []:
        x_rows, z_rows, known_rows = (layout.group(each, axes) for each in (x, z, known))
        if (known_rows.sum(-1) >= _MIN_NEURONS).all():
            found = list(forms(replace(draft, axes=axes), x, x_rows, z_rows, known_rows))
            if found:
                return found
    return []


def _cut(draft: Reading, x: Tensor, output: Tensor) -> Reading:
    """Note the ends of the gate's range, if gates of several groups are equal to them."""
    gates = draft.layout.group(draft.gate(x, output), draft.layout.axes)
    _, low, high = LINKS[draft.link]
    least, most = float(gates.min()), float(gates.max())

    def is_cut(end: float) -> bool:
        at_end = ((gates - end).abs() <= 8 * draft.precision * abs(end)).sum(-1)
        return bool((at_end > 0).sum() >= 2 and (at_end < gates.shape[-1]).all())

    if least > low and is_cut(least):
        draft = replace(draft, least=least)
    if most < high and is_cut(most):
        draft = replace(draft, most=most)
    return draft


def _usual_forms(
    draft: Reading, x: Tensor, rows: Tensor, z: Tensor, known: Tensor
) -> Iterator[Reading]:
    """Complete a reading if z is a polynomial of x, of degree 0 to 2."""
    layout, tolerance = draft.layout, draft.tolerance
    first = z.gather(-1, known.double().argmax(-1, keepdim=True))
    if ((z - first) * known).abs().max() <= tolerance:
        yield replace(draft, power="constant")
        return
    mean, spread = rows.mean(-1, keepdim=True), rows.std(-1, keepdim=True)
    xi = (rows - mean) / spread
    (square, slope, offset), error = solve([xi * xi, xi, torch.ones_like(xi)], z, known)
    if not error <= tolerance:
        return
    signed = bool((square.abs() <= 1e3 * tolerance * slope.abs()).all())
    for name, axes in itertools.product(CENTRES, subsets(layout.axes)):
        centre = (layout.group(layout.reduce(CENTRES[name], x, axes), draft.axes) - mean) / spread
        m = centre[..., 0]
        # The extreme of a parabola is its centre. The centre of a line hides in its offset, which
        # is the same in all groups for the right one.
        differs = slope * m + offset if signed else m + slope / (2 * square)
        differs = differs - differs.mean() if signed else differs
        if (centre == centre[..., :1]).all() and differs.abs().max() <= 1e3 * tolerance:
            power = "signed" if signed else "square"
            yield replace(draft, power=power, centre=name, centre_axes=axes)
            return


def _rare_forms(
    draft: Reading, x: Tensor, rows: Tensor, z: Tensor, known: Tensor
) -> Iterator[Reading]:
    """Complete a reading if z is a quotient in t, or linear in another power of the deviation."""
    one = torch.ones_like(rows)
    mean, spread = rows.mean(-1, keepdim=True), rows.std(-1, keepdim=True)
    t = ((rows - mean) / spread) ** 2
    (k, _, q), error = solve([t, one, -z * t], z, known)
    if error <= draft.tolerance:
        yield replace(draft, power="leave-one-out", centre_axes=draft.axes)
        limits = k / q  # of z, far outside
        if not draft.inverted and (limits - limits.mean()).abs().max() <= 1e3 * draft.tolerance:
            shifted = replace(draft, inverted=True, shift=float(limits.mean()))
            yield from _usual_forms(shifted, x, rows, 1 / (z - shifted.shift), known)
    for power, name in itertools.product(("absolute", "signed square"), ("mean", "median", "zero")):
        reading = replace(draft, power=power, centre=name, centre_axes=draft.axes)
        t = draft.layout.group(reading.deviation(x), draft.axes)
        if solve([t / t.abs().amax(-1, keepdim=True), one], z, known)[1] <= draft.tolerance:
            yield reading
            return


def subsets(axes: Axes) -> list[Axes]:
    """The subsets of some axes, from the largest."""
    return [each for n in range(len(axes), 0, -1) for each in itertools.combinations(axes, n)]


def _factors(subject: Subject, precision: float) -> dict[str, list[Tensor]]:
    """The factors of the gate to try for each output: 1, and the gate of a neuron far outside.

    The gate of such a neuron is at the end of its range, if it does not depend on the size of the
    map.
    """
    batch, channels, *spatial = subject.shape
    runs = []
    for length in (16, 20):
        x = torch.ones(batch, channels, *[length] * len(spatial), dtype=torch.float64)
        x.flatten(2)[..., 0] = 1e3
        try:
            runs.append((x, run(subject, x)))
        except ProbeError:
            runs = []
            break
    one = torch.ones(())
    factors = {}
    for name, gate in (PRODUCTS | SUMS).items():
        factors[name] = [one]
        limits = [gate(x, y).flatten(2)[:1, :, :1] for x, y in runs]
        if limits and _is_factor(limits[0], limits[1], 20 * precision):
            limit = limits[0].reshape(1, channels, *[1] * len(spatial))
            same = (limit - limit.mean()).abs().max() <= 20 * precision
            factors[name].append(limit.mean() if same else limit)
    return factors


def _is_factor(limit: Tensor, other: Tensor, tolerance: float) -> bool:
    settled = bool(((limit - other).abs() <= tolerance * limit.abs()).all())
    return settled and bool((limit.abs() > 1e-3).all()) and bool(((limit - 1).abs() > 1e-6).any())
