"""The two closed forms: lambda fitted to a module, and the largest difference of the two."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .subject import ProbeError, Subject

FORMS = ("shared", "leave_one_out")
# The error allowed, in units of the rounding of one operation. In float64 it is generous: 2e-12 is
# still far below what float32 can hold.
_ROUNDINGS = {True: 1e4, False: 100.0}


class Fit(NamedTuple):
    """A lambda, and its relative uncertainty."""

    e_lambda: float
    uncertainty: float


def fit_lambda(runs: Iterable[tuple[Tensor, Tensor]], statistics: str) -> Fit | None:
    """Fit lambda to inputs and outputs of a module, in case that it computes x times the gate.

    With t = (t - mu)^2 and v the variance, 1/e - 1/2 = t / (4 (v + lambda)); every neuron gives
    a lambda. The neurons of one input agree if the form is right and v is not far above lambda.
    """
    best = None
    for x, output in runs:
        x, output = x.double(), output.double()
        u = torch.logit(output / x) - 0.5
        square, variance = _statistics(x, statistics)
        lambdas = (square / (4 * u) - variance)[square > variance]
        if lambdas.numel() == 0 or not lambdas.isfinite().all():
            continue
        middle = float(lambdas.median())
        spread = float((lambdas - middle).abs().median()) / abs(middle) if middle else math.inf
        if middle > 0 and (best is None or spread < best.uncertainty):
            best = Fit(middle, spread)
    return best


def shortest(fit: Fit, known: Iterable[float], precision: float) -> float:
    """Round a fitted lambda, within its uncertainty: to a known number, or to few digits."""
    tolerance = max(3 * fit.uncertainty, precision)
    rounded = [float(f"{fit.e_lambda:.{digits}e}") for digits in range(17)]
    for number in (*known, *rounded):
        if abs(number - fit.e_lambda) <= tolerance * fit.e_lambda:
            return number
    return fit.e_lambda


class Agreement(NamedTuple):
    """How far a module is from a closed form.

    Attributes:
        exact (bool): every difference is within rounding.
        max_error (float): the largest difference of the outputs, divided by the largest value of
            the channel's input or output.
    """

    exact: bool
    max_error: float


def compare(
    subject: Subject, probes: Iterable[Tensor], e_lambda: float, statistics: str, precision: float
) -> Agreement:
    """Compare a module with a closed form.

    A deviation from the mean loses the digits that the mean has before it, and a variance by
    E x^2 - (E x)^2 loses them twice. So the error allowed in a channel is 1e4 times the rounding of
    float64, or 100 times that of float32, times (1 + |mean| / sqrt(variance + lambda))^2.
    """
    allowed = precision * _ROUNDINGS[precision < 1e-12]
    exact, max_error = True, 0.0
    for probe in probes:
        x = probe.to(subject.dtype)
        try:
            output = subject(x).double()
        except ProbeError:
            return Agreement(False, math.inf)
        wide = x.double()
        expected = reference.forward(wide, e_lambda, statistics)
        flat, got, right = (t.expand_as(wide).flatten(2) for t in (wide, output, expected))
        largest = torch.maximum(flat.abs().amax(-1), got.abs().nan_to_num(0).amax(-1))
        errors = (got - right).abs().amax(-1) / largest.clamp_min(1e-300)
        mean, variance = flat.mean(-1), flat.var(-1, correction=0)
        ratio = mean.abs() / (variance + e_lambda).sqrt()
        exact &= bool((errors <= allowed * (1 + ratio) ** 2).all())
        finite = errors[errors.isfinite()]
        if finite.numel():
            max_error = max(max_error, float(finite.max()))
    return Agreement(exact, max_error)


def _statistics(x: Tensor, statistics: str) -> tuple[Tensor, Tensor]:
    """The squared deviation and the variance of each neuron."""
    flat = x.flatten(2)
    m = flat.shape[-1]
    d = flat - flat.mean(-1, keepdim=True)
    sum_sq = (d * d).sum(-1, keepdim=True)
    if statistics == "shared":
        square, variance = d * d, (sum_sq / (m - 1)).expand_as(d)
    else:
        others = d * m / (m - 1)
        square, variance = others**2, (sum_sq - d * others) / (m - 1)
    return square.reshape(x.shape), variance.reshape(x.shape)
