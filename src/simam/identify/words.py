"""The deviations of a module in words."""

import math
from collections.abc import Iterable
from dataclasses import replace

from .dissection import Facts
from .layout import Axes, Layout

_OUTPUTS = {
    "residual": "returns x + x * gate instead of x * gate",
    "gate": "returns the gate instead of x * gate",
    "sum": "returns x + gate instead of x * gate",
}
_POWERS = {
    "signed": "takes the signed deviation instead of its square",
    "absolute": "takes the absolute deviation instead of its square",
    "signed square": "gives the squared deviation the sign of the deviation",
}
_LAWS = {
    "none": "does not divide by the variance",
    "standard deviation": "takes the standard deviation instead of the variance",
    "root of the sum": "takes the square root of the variance plus lambda",
    "square of the sum": "takes the square of the standard deviation plus lambda",
    "square of variance plus lambda": "takes the square of the variance plus lambda",
    "squared variance": "takes the squared variance instead of the variance",
}
_SPREADS = {
    "zero": "takes the mean square instead of the variance",
    "largest": "takes the largest squared deviation instead of the variance",
    "absolute": "takes the mean absolute deviation instead of the variance",
}


def join(parts: Iterable[str]) -> str:
    """Join phrases as a, b and c."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def deviations(facts: Facts, known: Iterable[float]) -> tuple[list[str], float | None]:
    """Name what differs from the shared form.

    Args:
        facts (Facts): the parts of a module.
        known (iterable of float): numbers that stand in the module; one of them may be its lambda.

    Returns:
        tuple[list[str], float or None]: a phrase for each deviation, and lambda.
    """
    reading = facts.reading
    phrases = []
    if reading.output != "product":
        phrases.append(_OUTPUTS[reading.output])
    if facts.spread.factor < 0 and reading.link == "sigmoid":  # sigmoid(-z) is 1 - sigmoid(z)
        phrases.append("takes 1 - gate instead of the gate")
        facts = replace(
            facts,
            spread=replace(facts.spread, factor=-facts.spread.factor),
            offset=-facts.offset,
            small_offset=-facts.small_offset,
        )
    if reading.factor.numel() > 1:
        phrases.append("multiplies each channel by a number of its own")
    elif abs(float(reading.factor) - 1) > 1e-9:
        phrases.append(f"multiplies the product by {float(reading.factor):.4g}")
    phrases += _statistics(facts)
    if reading.power in _POWERS:
        phrases.append(_POWERS[reading.power])
    if facts.pooled:
        verb = {"sum": "sums", "average": "averages"}[facts.pooled]
        phrases.append(f"{verb} the numerator over the map, so that a channel has one gate")
    if facts.law != "variance" and facts.spread.name != "absolute":
        phrases.append(_LAWS[facts.law])
    phrases += _divisor(facts)
    more, e_lambda = _lambda_and_offset(facts, known)
    phrases += more
    if facts.softmax:
        phrases.append("applies a softmax over the map instead of the sigmoid")
    elif reading.link == "identity":
        phrases.append("has no sigmoid")
    elif reading.link != "sigmoid":
        phrases.append(f"applies {reading.link} instead of the sigmoid")
    if reading.least > -math.inf:
        phrases.append(f"limits the gate to at least {reading.least:.4g}")
    if reading.most < math.inf:
        phrases.append(f"limits the gate to at most {reading.most:.4g}")
    if reading.inverted:
        phrases.append(
            "applies the sigmoid to the energy instead of its reciprocal, so that the order is "
            "inverted"
        )
        if abs(reading.shift) > 1e-6:
            phrases.append(f"adds {reading.shift:.4g} to the energy")
    return phrases, e_lambda


def _statistics(facts: Facts) -> list[str]:
    reading = facts.reading
    layout, phrases = reading.layout, []
    rank = len(layout.blocks)
    normal = tuple(range(2, rank))

    def is_normal(axes: Axes) -> bool:
        return axes == normal and all(layout.full[axis] for axis in axes)

    centre_axes = facts.spread.axes if facts.pooled else reading.centre_axes
    where = describe_axes(layout, facts.spread.axes)
    uncentred = reading.centre == "zero"
    if facts.law == "none":
        if not uncentred and not is_normal(centre_axes):
            phrases.append(f"takes the mean {describe_axes(layout, centre_axes)}")
    elif centre_axes == facts.spread.axes or uncentred:
        if not is_normal(facts.spread.axes):
            phrases.append(f"takes the statistics {where}")
    else:
        if not is_normal(centre_axes):
            phrases.append(f"takes the mean {describe_axes(layout, centre_axes)}")
        if not is_normal(facts.spread.axes):
            phrases.append(f"takes the variance {where}")
    if uncentred:
        phrases.append("does not subtract the mean")
    elif reading.centre != "mean":
        phrases.append(f"subtracts the {reading.centre} instead of the mean")
    expected = "mean" if reading.centre == "mean" else reading.centre
    if facts.law != "none" and facts.spread.name in _SPREADS and facts.spread.name != expected:
        phrases.append(_SPREADS[facts.spread.name])
    return phrases


def describe_axes(layout: Layout, axes: Axes) -> str:
    """Say over what the statistics are taken."""
    rank = len(layout.blocks)
    last = rank - 1
    parts = [axis for axis in axes if not layout.full[axis]]
    if parts == [1]:
        rest = " and the map" if set(axes) > {1} else " at each position"
        return f"over groups of {layout.blocks[1]} channels{rest}"
    if parts:
        size = "x".join(str(layout.blocks[axis]) for axis in axes)
        return f"over blocks of {size} instead of the map"
    spatial = tuple(range(2, rank))
    if axes == tuple(range(1, last)):
        return "as if the last axis were the channels"
    if axes == (1,):
        return "over the channels at each position"
    if axes == (0, *spatial):
        return "over the batch and the map"
    if axes == (1, *spatial):
        return "over all channels of a sample together"
    if axes == (0, 1, *spatial):
        return "over all values of the batch together"
    if axes == (0,):
        return "over the batch"
    if axes == (last,):
        return "over the last axis only"
    return f"over {'axis' if len(axes) == 1 else 'the axes'} {join(map(str, axes))} only"


def _divisor(facts: Facts) -> list[str]:
    phrases = []
    leave_one_out = facts.reading.power == "leave-one-out"
    if leave_one_out:
        phrases.append("takes leave-one-out statistics")
        if not facts.spread.others:
            phrases.append("but the deviation from the mean of the whole channel")
    elif facts.spread.others:
        phrases.append(
            "takes the deviation from the mean of the other neurons, but the variance of all"
        )
    if facts.law == "none" or facts.spread.name in ("largest", "absolute"):
        return phrases
    if facts.spread.divisor == "1":
        phrases.append("does not divide the sum of squares")
    elif facts.spread.divisor.isdigit():
        phrases.append(
            f"divides the sum of squares by {facts.spread.divisor} on maps of every size"
        )
    elif facts.spread.divisor != "M - 1":
        phrases.append(f"divides the sum of squares by {facts.spread.divisor} instead of M - 1")
    return phrases


def _lambda_and_offset(facts: Facts, known: Iterable[float]) -> tuple[list[str], float | None]:
    phrases: list[str] = []
    factor, offset = facts.spread.factor, facts.offset
    e_lambda = facts.spread.e_lambda
    scaled = (
        factor > 0
        and abs(factor * offset - 2) < 1e-3
        and abs(factor - 4) > 1e-3
        and facts.law != "none"
    )
    if scaled and not facts.softmax:
        phrases.append(f"multiplies 1/e by {4 / factor:.4g} before the sigmoid")
    elif facts.law == "none":
        phrases.append(f"divides the deviation by {factor:.4g}")
    elif abs(factor - 4) > 1e-3:
        phrases.append(f"has the factor {factor:.4g} instead of 4")

    if facts.law == "none":
        e_lambda = None
    elif e_lambda is None:
        phrases.append("has a lambda that changes with the size of the map")
    elif facts.spread.floor is not None:
        in_place = " in place of lambda" if e_lambda == 0 else ""
        phrases.append(f"has a floor of {facts.spread.floor:.4g} under the variance{in_place}")
    elif e_lambda == 0:
        phrases.append("has no lambda")
    elif facts.spread.divided:
        phrases.append("adds lambda to the sum of squares, so that lambda is divided too")
    e_lambda = e_lambda or None
    if facts.softmax or scaled:
        return phrases, e_lambda

    if abs(offset) < 1e-4 and e_lambda and abs(facts.small_offset) < 1e-4:
        inside = e_lambda - 0.5 / factor
        if inside > -1e-9 and _is_plainer(inside, e_lambda, known):
            phrases.append("has the 1/2 inside the denominator")
            if inside < 1e-9:
                phrases.append("has no lambda")
            return phrases, inside if inside >= 1e-9 else None
    if abs(offset) < 1e-4:
        phrases.append("has no 1/2")
    elif abs(offset - 0.5) > 1e-4:
        phrases.append(f"adds {offset:.4g} instead of 1/2")
    change = facts.small_offset - offset
    if abs(change) > 1e-3:
        times = 4 * facts.small_offset
        if abs(offset - 0.5) < 1e-4 and abs(times - round(times)) < 1e-3:
            how_often = {0: "not at all", 1: "once"}.get(round(times), f"{round(times)} times")
            phrases.append(
                f"counts lambda {how_often} instead of twice in the denominator of the energy"
            )
        else:
            phrases.append(f"adds {offset + change:.4g} where the variance is far below lambda")
    return phrases, e_lambda


def _is_plainer(number: float, other: float, known: Iterable[float]) -> bool:
    """Whether a number looks more like somebody's choice than another number."""

    def length(value: float) -> int:
        if any(abs(value - each) <= 1e-6 * abs(each) for each in known):
            return 0
        return next(n for n in range(17) if abs(float(f"{value:.{n}e}") / value - 1) < 1e-6)

    return number < 1e-9 or length(number) < length(other)
