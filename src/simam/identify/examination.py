"""The examination of a module, from the first probe to the verdict."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import behaviour, probes
from .closed_forms import FORMS, Fit, compare, fit_lambda, shortest
from .dissection import dissect
from .layout import run
from .subject import ProbeError, Subject, quietly
from .words import deviations, join

_USUAL_LAMBDA = 1e-4
_FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """The fields of an `Identification`, and the ranks of input for which it does not hold."""

    formula: str
    e_lambda: float | None
    max_error: float
    difference: str
    other_ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Match:
    form: str
    e_lambda: float
    max_error: float


def examine(module: nn.Module) -> Verdict:
    """Examine a copy of a module.

    Raises:
        ValueError: the module cannot be copied, or takes no input that was tried.
    """
    with quietly():
        return _examine(module)


def _examine(module: nn.Module) -> Verdict:
    subject = Subject(module)
    unfit = behaviour.unfit(subject)
    if unfit:
        return Verdict("other", None, math.inf, unfit)
    precision, dtype = behaviour.precision_of(subject)
    numbers = behaviour.numbers_in(module)
    shapes = [shape for shape in probes.sizes(subject.shape) if subject.takes(shape)]
    # Two numbers of half precision may be equal by chance, so it allows no verdict.
    match = _match(subject, numbers, precision, shapes) if precision <= _FLOAT32 else None
    in_training = behaviour.training_mode(subject)
    names, used = behaviour.parameters(subject)
    single, single_is_right = behaviour.single_neuron(subject)

    ranks: list[int] = []
    departures: list[str] = []  # each of them makes the module another formula
    if match:
        e_lambda: float | None = match.e_lambda
        ranks = behaviour.other_ranks(subject, match.e_lambda, match.form, precision)
        departures.append(behaviour.gradient(subject, match.e_lambda, match.form, precision))
        departures.append("" if single_is_right else single)
        nearest = match
    else:
        phrases, e_lambda = _describe(subject, numbers, precision)
        departures += phrases
        nearest = _nearest(subject, e_lambda, numbers, precision)
    departures += [
        f"computes in {dtype}" if precision > _FLOAT32 else "",
        "returns a tuple" if subject.returns_tuple else "",
        "overwrites its input" if subject.overwrites else "",
        f"has {behaviour.name_parameters(used)} that change its output" if used else "",
        in_training,
    ]
    departures = [text for text in departures if text]
    if not match and not departures:
        departures = ["computes something else by a small amount"]
    unused = [name for name in names if name not in used]
    notes = [
        *behaviour.lambda_notes(subject, numbers, e_lambda),
        "computes in float32" if dtype == "float32" and subject.dtype == torch.float64 else "",
        f"has {behaviour.name_parameters(unused)} without use" if unused else "",
        *(f"computes something else on {rank}-D input" for rank in ranks),
        behaviour.fixed_size(subject),
        single if single_is_right else "",
        behaviour.half_precision(subject),
    ]
    texts = [text for text in (*departures, *notes) if text]
    difference = join(texts) if texts else ""
    if departures:
        difference += f" (nearest form: {nearest.form}, e_lambda={nearest.e_lambda:.6g})"
    formula = "other" if departures or not match else match.form
    return Verdict(formula, e_lambda, nearest.max_error, difference, tuple(ranks))


def _match(
    subject: Subject,
    numbers: Mapping[str, float],
    precision: float,
    shapes: list[tuple[int, ...]],
) -> _Match | None:
    """Find the closed form that the module equals on all probes."""
    runs = list(_runs(subject))
    y = probes.pattern(subject.shape)
    for form in FORMS:
        fit = fit_lambda(runs, form)
        if fit is None:
            continue
        for e_lambda in dict.fromkeys((shortest(fit, numbers.values(), precision), fit.e_lambda)):
            if not compare(subject, [y], e_lambda, form, precision).exact:
                continue
            others = (
                scale * probes.pattern(shape)
                for shape in shapes
                for scale in (math.sqrt(e_lambda), 1.0)
            )
            all_probes = itertools.chain(probes.varied(subject.shape, e_lambda), others)
            agreement = compare(subject, all_probes, e_lambda, form, precision)
            if agreement.exact:
                return _Match(form, e_lambda, agreement.max_error)
    return None


def _runs(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    y = probes.pattern(subject.shape)
    for scale in probes.SCALES:
        x = (scale * y).to(subject.dtype)
        try:
            yield x, subject(x).expand_as(x)
        except ProbeError:
            continue


def _describe(
    subject: Subject, numbers: Mapping[str, float], precision: float
) -> tuple[list[str], float | None]:
    """Name the deviations of a module, by the description that needs the fewest."""
    if precision > _FLOAT32:
        return [], _rough_lambda(subject, numbers, precision)
    known = list(numbers.values())
    found = [deviations(facts, known) for facts in dissect(subject, precision)]
    if not found:
        return [behaviour.unexplained(subject, precision)], None
    phrases, e_lambda = min(found, key=lambda each: len(each[0]))
    if e_lambda is not None:
        e_lambda = shortest(Fit(e_lambda, 1e-6), known, precision)
    return phrases, e_lambda


def _rough_lambda(subject: Subject, numbers: Mapping[str, float], precision: float) -> float | None:
    """Fit lambda to a module that computes in half precision."""
    y = probes.pattern(subject.shape)
    runs = [(scale * y, run(subject, scale * y)) for scale in probes.SCALES if 1e-2 < scale < 1e2]
    for form in FORMS:
        fit = fit_lambda(runs, form)
        if fit is not None:
            e_lambda = shortest(fit, numbers.values(), 4 * precision)
            agreement = compare(subject, [y], e_lambda, form, precision)
            if agreement.max_error <= 2 * precision:
                return e_lambda
    return None


def _nearest(
    subject: Subject, e_lambda: float | None, numbers: Mapping[str, float], precision: float
) -> _Match:
    """Find the closed form with the least error, for the lambda of the module or a usual one."""
    lambdas = [e_lambda or behaviour.stated_lambda(numbers) or _USUAL_LAMBDA]
    y = probes.pattern(subject.shape)
    matches = []
    for form, each in itertools.product(FORMS, lambdas):
        agreement = compare(
            subject, (scale * y for scale in (math.sqrt(each), 1.0)), each, form, precision
        )
        matches.append(_Match(form, each, agreement.max_error))
    return min(matches, key=lambda match: match.max_error)
