"""What a module does beside its formula: modes, parameters, gradients, dtypes, its own lambda."""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..messages import first_few, format_shape
from . import probes
from .layout import affected, is_product
from .reading import PRODUCTS, SUMS
from .subject import ProbeError, Subject

_LAMBDA_NAMES = ("lambda", "lamda", "lmbda", "lambd", "lam", "regulariser", "regularizer")


def unfit(subject: Subject) -> str:
    """Say why the outputs of a module cannot be examined; "" if they can."""
    x = probes.pattern(subject.shape).to(subject.dtype)
    output = subject(x)
    try:
        output.expand_as(x)
    except RuntimeError:
        got, given = format_shape(output.shape), format_shape(x.shape)
        return f"returns a tensor of shape {got} for an input of shape {given}"
    fresh = copy.deepcopy(subject.copy)
    if not same(subject(x, fresh), subject(x, copy.deepcopy(subject.copy))):
        return "has a random output, also in evaluation mode"
    subject(2 * x + 1, fresh)
    if not same(subject(x, fresh), subject(x, copy.deepcopy(subject.copy))):
        return "has an output that depends on earlier calls"
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal, NaN included."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def training_mode(subject: Subject) -> str:
    """Say what differs in training mode; "" if nothing does."""
    x = probes.pattern(subject.shape).to(subject.dtype)
    expected = subject(x)
    try:
        first, second = (subject(x, copy.deepcopy(subject.copy).train()) for _ in range(2))
    except ProbeError as error:
        return f"fails in training mode ({error})"
    if not same(first, second):
        return "has a random output in training mode"
    return "" if same(first, expected) else "computes something else in training mode"


def parameters(subject: Subject) -> tuple[list[str], list[str]]:
    """Return the names of the parameters, and of those that change the output."""
    x = probes.pattern(subject.shape).to(subject.dtype)
    expected = subject(x)
    names = [name for name, _ in subject.copy.named_parameters()]
    used = []
    for name in names:
        changed = copy.deepcopy(subject.copy)
        changed.get_parameter(name).mul_(1.5).add_(0.25)
        try:
            if same(subject(x, changed), expected):
                continue
        except ProbeError:
            pass
        used.append(name)
    return names, used


def gradient(subject: Subject, e_lambda: float, statistics: str, precision: float) -> str:
    """Say how the gradient differs from that of a closed form; "" if it does not."""
    x = probes.pattern(subject.shape).to(subject.dtype)
    cotangent = probes.pattern(subject.shape[::-1]).permute(*reversed(range(x.dim())))
    with torch.enable_grad():
        leaf = x.requires_grad_()
        try:
            output = subject(leaf, copy.deepcopy(subject.copy)).double()
        except ProbeError as error:
            return f"fails where x requires a gradient ({error})"
        if not output.requires_grad:
            return "passes no gradient to its input"
        (got,) = torch.autograd.grad(output, leaf, cotangent)
    wide = x.detach().double()
    expected = reference.backward(cotangent, wide, e_lambda, statistics)
    allowed = 1e4 * precision * expected.abs().max()
    if not bool(((got - expected).abs() <= allowed).all()):
        constant = cotangent * reference.attention(wide, e_lambda, statistics)
        if bool(((got - constant).abs() <= allowed).all()):
            return "passes no gradient through the gate"
        return "has another gradient than its formula"
    return ""


def single_neuron(subject: Subject) -> tuple[str, bool]:
    """Say what happens to a map of one element, and whether the output is as it should be.

    An output of NaN and an error count as right: they are no other formula.
    """
    batch, channels = subject.shape[:2]
    shape = (batch, channels, *[1] * (len(subject.shape) - 2))
    x = torch.linspace(-2, 3, batch * channels, dtype=subject.dtype).reshape(shape)
    try:
        output = subject(x)
    except ProbeError as error:
        if subject.takes(probes.sizes(subject.shape)[0]):
            return f"fails on a map of one element ({error})", True
        return "", True  # it takes maps of one size alone, of which another phrase tells
    if output.isnan().any():
        return "gives NaN on a map of one element", True
    expected = x * torch.sigmoid(torch.tensor(0.5, dtype=torch.float64))
    if output.shape == x.shape and bool((output - expected).abs().max() < 1e-5):
        return "", True
    if torch.equal(output, x):
        return "returns a map of one element unchanged", False
    return "has another gate than sigmoid(1/2) on a map of one element", False


def half_precision(subject: Subject) -> str:
    """Say what goes wrong in float16, compared with the module's own wider arithmetic."""
    _, channels, *spatial = subject.shape
    large = (1, channels, *([56] * len(spatial) if len(spatial) < 3 else [4, 28, 28]))
    shape = large if subject.takes(large) else subject.shape
    y = probes.pattern(shape)
    narrow = copy.deepcopy(subject.copy).half()
    worst = 0.0
    for scale in (1.0, 20.0, 100.0):
        x = (scale * y).half()
        try:
            output = subject(x, narrow)
            expected = subject(x.to(subject.dtype)).double()
        except ProbeError:
            return ""
        if output.dtype != torch.float16:
            return f"returns {_name(output.dtype)} for float16"
        error = (output.double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error)) if error.isfinite() else math.inf
    if worst > 0.02:
        return "overflows in float16"
    return ""


def precision_of(subject: Subject) -> tuple[float, str]:
    """Find the dtype that a module computes in: the relative error of one operation, and its name.

    It shows in the output or in the gate, whose values that dtype can hold.
    """
    x = probes.pattern(subject.shape).to(subject.dtype)
    output = subject(x)
    found = output.dtype
    wide = output.double()
    gate = wide / x.double() if wide.shape == x.shape else wide
    if len(set(gate.flatten().tolist())) > 10:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            allowed = 4 * torch.finfo(found).eps * gate.abs()
            in_gate = bool(((gate.to(dtype).double() - gate).abs() <= allowed).all())
            if in_gate or torch.equal(wide.to(dtype).double(), wide):
                found = dtype
            if torch.finfo(found).bits == 16:
                break
    return torch.finfo(found).eps, _name(found)


def other_ranks(subject: Subject, e_lambda: float, statistics: str, precision: float) -> list[int]:
    """Return the numbers of dimensions of an input for which a module departs from its form."""
    found = []
    for shape in ((2, 3, 11), (2, 3, 4, 5), (2, 3, 2, 4, 3)):
        if len(shape) == len(subject.shape):
            continue
        x = probes.pattern(shape).to(subject.dtype)
        try:
            output = subject(x).double()
        except ProbeError:
            continue
        expected = reference.forward(x.double(), e_lambda, statistics)
        agrees = output.shape == expected.shape and bool(
            ((output - expected).abs() <= 1e3 * precision * x.abs().max()).all()
        )
        if not agrees:
            found.append(len(shape))
    return found


def numbers_in(module: nn.Module) -> dict[str, float]:
    """Numbers that a module holds or that its code names: attributes, constants, defaults."""
    numbers: dict[str, float] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, float):
                numbers.setdefault(name, value)
            elif isinstance(value, Tensor) and value.numel() == 1:
                numbers.setdefault(name, float(value))
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        numbers |= {name: float(value) for name, value in tensors if value.numel() == 1}
        code = getattr(type(part).forward, "__code__", None)
        if code is not None and not type(part).__module__.startswith("torch."):
            numbers |= {str(value): value for value in _constants(code)}
    return numbers


def _constants(code: CodeType) -> Iterator[float]:
    for constant in code.co_consts:
        if isinstance(constant, float):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _constants(constant)


def stated_lambda(numbers: Mapping[str, float]) -> float | None:
    """The first of the numbers that is called lambda."""
    return next((each for name, each in numbers.items() if _means_lambda(name) and each > 0), None)


def lambda_notes(
    subject: Subject, numbers: Mapping[str, float], e_lambda: float | None
) -> list[str]:
    """Say how the lambda that a module is given differs from the one that it computes with."""
    ignored = _ignored_lambda(subject, e_lambda)
    if ignored:
        return [ignored]
    if e_lambda is None or any(_near(each, e_lambda) for each in numbers.values()):
        return []
    for name, value in numbers.items():
        given = f"{value:g}" if name == str(value) else f"{name}={value:g}"
        if _near(value, 4 * e_lambda):
            return [f"has lambda outside the factor 4, so that {given} acts as {e_lambda:.6g}"]
        if _means_lambda(name):
            return [f"computes with {e_lambda:.6g} where it is given {given}"]
    return []


def _ignored_lambda(subject: Subject, e_lambda: float | None) -> str:
    """Name a lambda, an attribute or an argument of the constructor, that changes nothing."""
    x = probes.pattern(subject.shape).to(subject.dtype)
    module: Any = subject.copy
    expected = subject(x)
    names = [n for n, v in vars(module).items() if _means_lambda(n) and type(v) in (float, int)]
    for name in names:
        value = getattr(module, name)
        changed = copy.deepcopy(module)
        setattr(changed, name, 3.0 * value + 1.0)
        if not _gives(subject, x, changed, expected):
            return ""
        if e_lambda is None or not _near(value, e_lambda):
            return f"ignores its {name}={value:g}"
    if any(True for _ in module.parameters()):
        return ""
    try:
        arguments = inspect.signature(type(module)).parameters
        name = next(name for name in arguments if _means_lambda(name))
        small, large = (
            type(module)(**{name: each}).eval().to(subject.dtype) for each in (1e-3, 10.0)
        )
        if _gives(subject, x, large, subject(x, small)):
            return f"ignores the {name} of its constructor"
    except Exception:  # no such argument, or other arguments are needed
        return ""
    return ""


def unexplained(subject: Subject, precision: float) -> str:
    """Say what is known of a module that computes none of the known forms."""
    product = is_product(subject)
    gate = next(iter((PRODUCTS if product else SUMS).values()))
    layout = affected(subject, gate, precision)
    if not layout.axes:
        return "computes every output from one input value alone"
    if not layout.regular:
        return "takes statistics over windows that overlap instead of the map"
    return "computes none of the known forms"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * abs(b)


def _means_lambda(name: str) -> bool:
    name = name.lower().replace("_", "")
    return any(word in name for word in _LAMBDA_NAMES)


def _gives(subject: Subject, x: Tensor, module: nn.Module, expected: Tensor) -> bool:
    try:
        return same(subject(x, module), expected)
    except ProbeError:
        return False


def fixed_size(subject: Subject) -> str:
    """Say that a module takes maps of one size alone, or no batch of one; "" otherwise."""
    _, channels, *spatial = subject.shape
    others = [shape for shape in probes.sizes(subject.shape) if shape[:2] == subject.shape[:2]]
    if not any(subject.takes(shape) for shape in others if shape != subject.shape):
        return f"takes only maps of {format_shape(spatial)}"
    if not subject.takes((1, channels, *spatial)):
        return "fails on a batch of one sample"
    return ""


def name_parameters(names: list[str]) -> str:
    """Write the parameters of a module."""
    return f"parameters ({first_few(names)})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
