"""Compute what a description says, to compare it with the module that it describes."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import probes
from .curve import LAWS
from .facts import Facts
from .layout import run
from .reading import CENTRES, POWERS
from .spread import SUMS_OF_SPREADS, divisors
from .subject import ProbeError, Subject

_LINKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
}
_OUTPUTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, gate: x * gate,
    "residual": lambda x, gate: x + x * gate,
    "gate": lambda x, gate: gate,
    "sum": lambda x, gate: x + gate,
}


def holds(subject: Subject, facts: Facts) -> bool:
    """Return whether a description gives the outputs of the module, at several scales."""
    y = probes.pattern(subject.shape)
    e_lambda = facts.spread.e_lambda
    if e_lambda is None:  # it is known for no map
        return True
    for scale in (*probes.SIZES, math.sqrt(e_lambda or 1.0)):
        x = scale * y
        try:
            output = run(subject, x)
        except ProbeError:
            return False
        error = (synthesize(facts, x) - output).abs().max() / output.abs().max()
        if not error <= facts.reading.precision**0.45:  # what the errors of the fits amount to
            return False
    return True


def synthesize(facts: Facts, x: Tensor) -> Tensor:
    """Compute the output that a description says (Tensor like x)."""
    reading = facts.reading
    z = _exponent(facts, x)
    if reading.inverted:
        z = 1 / z + reading.shift
    gate = _LINKS[reading.link](z)
    if facts.softmax:
        gate = gate / reading.layout.reduce(lambda rows: rows.sum(-1), gate, reading.axes)
    gate = gate.clamp(reading.least, reading.most) * reading.factor
    return _OUTPUTS[reading.output](x, gate)


def _exponent(facts: Facts, x: Tensor) -> Tensor:
    """Compute z."""
    reading, spread = facts.reading, facts.spread
    layout = reading.layout
    number = divisors(layout, spread.axes, x.shape).get(spread.divisor)
    number = float(spread.divisor) if number is None else number
    m = layout.count(x.shape, spread.axes)
    ratio = m / (m - 1)
    total = layout.reduce(SUMS_OF_SPREADS[spread.name], x, spread.axes)
    if facts.pooled:
        t = total if facts.pooled == "sum" else total / m
    else:
        d = x - layout.reduce(CENTRES[reading.centre], x, reading.centre_axes)
        t = POWERS.get(reading.power, POWERS["square"])(d)
        if reading.power == "leave-one-out":
            total = total - t * ratio
        if spread.others:
            t = t * ratio**2
    if facts.law == "none":
        return t / spread.factor + facts.offset
    v = (total / number).clamp_min(spread.floor or 0.0)
    e_lambda = (spread.e_lambda or 0.0) / (number if spread.divided else 1)
    p, q = next(key for key, name in LAWS.items() if name == facts.law)
    inverse = spread.factor * (v ** (p * q / 2) + e_lambda) ** (1 / q)
    small = e_lambda / (v ** (p * q / 2) + e_lambda)  # 1 where v is far below lambda
    return t / inverse + facts.offset + (facts.small_offset - facts.offset) * small
