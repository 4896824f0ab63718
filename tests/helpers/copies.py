"""Hand-written SimAM modules, as networks carry them: some right, most of them not quite.

`COPIES` lists each with the right answer of `simam.identify`: the formula, lambda, and pieces of
the text that says what differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

MAP = (2, 3)


def deviations(x: Tensor, dims: Any = MAP) -> Tensor:
    return x - x.mean(dims, keepdim=True)


def inverse_energy(x: Tensor, e_lambda: float, dims: Any = MAP, minus: int = 1) -> Tensor:
    """The exponent of the paper, with the variance over M - minus."""
    square = deviations(x, dims) ** 2
    dims = (dims,) if isinstance(dims, int) else dims
    count = math.prod(x.shape[dim] for dim in dims) - minus
    variance = square.sum(dims, keepdim=True) / count
    return square / (4 * (variance + e_lambda)) + 0.5


class Authors(nn.Module):
    """Shared statistics, lambda inside the factor 4; maps of four dimensions alone."""

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, _ = x.shape
        squares = deviations(x).square()
        variance = squares.sum(MAP, keepdim=True) / (x[0, 0].numel() - 1)
        return x * self.gate(squares / (4 * (variance + self.e_lambda)) + 0.5)


class AuthorsFlat(nn.Module):
    """The same by torch.var over a flattened map; it takes maps of any rank."""

    def __init__(self, reg: float = 1e-4) -> None:
        super().__init__()
        self.reg = reg

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        variance, mean = torch.var_mean(flat, dim=-1, keepdim=True, unbiased=True)
        energy = 4 * (variance + self.reg) / ((flat - mean) ** 2 + 2 * variance + 2 * self.reg)
        return (flat * torch.sigmoid(1 / energy)).view_as(x)


class AuthorsEinsum(nn.Module):
    """The same by einsum, with a hard-coded lambda."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - torch.einsum("bchw->bc", x)[..., None, None] / (x.shape[2] * x.shape[3])
        total = torch.einsum("bchw,bchw->bc", d, d)[..., None, None]
        variance = total / (x.shape[2] * x.shape[3] - 1)
        return torch.sigmoid(d * d / (variance * 4 + 4 * 0.01) + 0.5).mul(x)


class LeaveOneOut(nn.Module):
    """Mean and variance of the other neurons, by subtraction of the neuron from the sums."""

    def __init__(self, lam: float = 1e-4) -> None:
        super().__init__()
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[2] * x.shape[3] - 1
        mean = (x.sum(MAP, keepdim=True) - x) / count
        d = deviations(x)
        mean_square = (d.square().sum(MAP, keepdim=True) - d.square()) / count
        offset = d - (x - mean)  # the mean of the others, as a deviation
        variance = mean_square - offset**2
        energy = 4 * (variance + self.lam) / ((x - mean) ** 2 + 2 * variance + 2 * self.lam)
        return x * (1 / energy).sigmoid()


class Formula(nn.Module):
    """A copy given by a function of x and lambda."""

    def __init__(self, function: Callable[[Tensor, float], Tensor], e_lambda: float) -> None:
        super().__init__()
        self.function = function
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.e_lambda)


def over_m(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, minus=0))


def over_m_minus_2(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, minus=2))


def over_width(x: Tensor, e: float) -> Tensor:
    square = deviations(x) ** 2
    variance = square.sum(MAP, keepdim=True) / (x.shape[3] * x.shape[3] - 1)
    return x * torch.sigmoid(square / (4 * (variance + e)) + 0.5)


def undivided(x: Tensor, e: float) -> Tensor:
    square = deviations(x) ** 2
    return x * torch.sigmoid(square / (4 * (square.sum(MAP, keepdim=True) + e)) + 0.5)


def outside(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * x.var(MAP, keepdim=True) + e) + 0.5)


def lambda_once(x: Tensor, e: float) -> Tensor:
    variance = x.var(MAP, keepdim=True)
    energy = 4 * (variance + e) / (deviations(x) ** 2 + 2 * variance + e)
    return x * torch.sigmoid(1 / energy)


def lambda_divided(x: Tensor, e: float) -> Tensor:
    square = deviations(x) ** 2
    variance = (square.sum(MAP, keepdim=True) + e) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(square / (4 * variance) + 0.5)


def no_lambda(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * x.var(MAP, keepdim=True)) + 0.5)


def floor(x: Tensor, e: float) -> Tensor:
    variance = x.var(MAP, keepdim=True).clamp(min=e)
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * variance) + 0.5)


def floor_and_lambda(x: Tensor, e: float) -> Tensor:
    variance = x.var(MAP, keepdim=True).clamp(min=1e-3)
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * (variance + e)) + 0.5)


def pooled(x: Tensor, e: float) -> Tensor:
    square = (deviations(x) ** 2).sum(MAP, keepdim=True)
    variance = square / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(square / (4 * (variance + e)) + 0.5)


def no_sigmoid(x: Tensor, e: float) -> Tensor:
    return x * inverse_energy(x, e)


def tanh(x: Tensor, e: float) -> Tensor:
    return x * inverse_energy(x, e).tanh()


def hard_sigmoid(x: Tensor, e: float) -> Tensor:
    return x * nnf.hardsigmoid(inverse_energy(x, e))


def softplus(x: Tensor, e: float) -> Tensor:
    return x * nnf.softplus(inverse_energy(x, e))


def softmax(x: Tensor, e: float) -> Tensor:
    return x * inverse_energy(x, e).flatten(2).softmax(-1).view_as(x)


def no_half(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e) - 0.5)


def half_in_denominator(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * (x.var(MAP, keepdim=True) + e) + 0.5))


def one_for_half(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e) + 0.5)


def inverted(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(1 / inverse_energy(x, e))


def signed(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) / (4 * (x.var(MAP, keepdim=True) + e)) + 0.5)


def absolute(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x).abs() / (4 * (x.var(MAP, keepdim=True) + e)) + 0.5)


def standard_deviation(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * (x.std(MAP, keepdim=True) + e)) + 0.5)


def root(x: Tensor, e: float) -> Tensor:
    scale = torch.sqrt(x.var(MAP, keepdim=True) + e)
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * scale) + 0.5)


def factor_two(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(deviations(x) ** 2 / (2 * (x.var(MAP, keepdim=True) + e)) + 0.5)


def temperature(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e) / 2)


def over_channels(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, 1))


def over_rows(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, -1))


def over_columns(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, 2))


def over_batch(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, (0, 2, 3)))


def over_sample(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, (1, 2, 3)))


def over_groups(x: Tensor, e: float) -> Tensor:
    grouped = x.unflatten(1, (-1, 4))
    return (grouped * torch.sigmoid(inverse_energy(grouped, e, (2, 3, 4)))).view_as(x)


def channels_last(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e, (1, 2)))


def mean_of_map_variance_of_sample(x: Tensor, e: float) -> Tensor:
    variance = x.var((1, 2, 3), keepdim=True)
    return x * torch.sigmoid(deviations(x) ** 2 / (4 * (variance + e)) + 0.5)


def median(x: Tensor, e: float) -> Tensor:
    flat = x.flatten(2)
    square = (flat - flat.median(-1, keepdim=True).values) ** 2
    variance = square.sum(-1, keepdim=True) / (flat.shape[-1] - 1)
    return (flat * torch.sigmoid(square / (4 * (variance + e)) + 0.5)).view_as(x)


def maximum(x: Tensor, e: float) -> Tensor:
    square = (x - x.amax(MAP, keepdim=True)) ** 2
    return x * torch.sigmoid(square / (4 * (x.var(MAP, keepdim=True) + e)) + 0.5)


def uncentred(x: Tensor, e: float) -> Tensor:
    square = x**2
    variance = square.sum(MAP, keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(square / (4 * (variance + e)) + 0.5)


def gate(x: Tensor, e: float) -> Tensor:
    return torch.sigmoid(inverse_energy(x, e))


def residual(x: Tensor, e: float) -> Tensor:
    return x + x * torch.sigmoid(inverse_energy(x, e))


def added_gate(x: Tensor, e: float) -> Tensor:
    return x + torch.sigmoid(inverse_energy(x, e))


def reversed_gate(x: Tensor, e: float) -> Tensor:
    return x - x * torch.sigmoid(inverse_energy(x, e))


def scaled(x: Tensor, e: float) -> Tensor:
    return 1.5 * x * torch.sigmoid(inverse_energy(x, e))


def pair(x: Tensor, e: float) -> Any:
    gates = torch.sigmoid(inverse_energy(x, e))
    return x * gates, gates


def in_place(x: Tensor, e: float) -> Tensor:
    return x.mul_(torch.sigmoid(inverse_energy(x, e)))


def detached_gate(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x.detach(), e))


def bfloat16(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x.bfloat16(), e)).to(x.dtype)


def single(x: Tensor, e: float) -> Tensor:
    return (x.float() * torch.sigmoid(inverse_energy(x.float(), e))).to(x.dtype)


def noisy(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e) + 0.1 * torch.randn_like(x))


def loo_mean_only(x: Tensor, e: float) -> Tensor:
    count = x.shape[2] * x.shape[3]
    square = (deviations(x) * count / (count - 1)) ** 2
    return x * torch.sigmoid(square / (4 * (x.var(MAP, keepdim=True) + e)) + 0.5)


def loo_unbiased(x: Tensor, e: float) -> Tensor:
    count = x.shape[2] * x.shape[3]
    d = deviations(x)
    others = d * count / (count - 1)
    variance = ((d**2).sum(MAP, keepdim=True) - d * others) / (count - 2)
    return x * torch.sigmoid(others**2 / (4 * (variance + e)) + 0.5)


def gate_over_m(x: Tensor, e: float) -> Tensor:
    return torch.sigmoid(inverse_energy(x, e, minus=0) - 0.5)


def residual_signed_rows(x: Tensor, e: float) -> Tensor:
    d = deviations(x, 3)
    return x + x * torch.sigmoid(d / (4 * (x.var(3, keepdim=True, unbiased=False) + e)) + 0.5)


def energy_plus_half(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(1 / inverse_energy(x, e) + 0.5)


def lambda_four_times(x: Tensor, e: float) -> Tensor:
    variance = x.var(MAP, keepdim=True)
    inverse = (deviations(x) ** 2 + 2 * (variance + 2 * e)) / (4 * (variance + e))
    return x * torch.sigmoid(inverse)


def share_of_lambda(x: Tensor, e: float) -> Tensor:
    total = (deviations(x) ** 2).sum(MAP, keepdim=True)
    return x * total / (total + e)


def fixed_count(x: Tensor, e: float) -> Tensor:
    square = deviations(x) ** 2
    return x * torch.sigmoid(square / (4 * (square.sum(MAP, keepdim=True) / 48 + e)) + 0.5)


def cut(x: Tensor, e: float) -> Tensor:
    return x * torch.sigmoid(inverse_energy(x, e).clamp(max=3))


def mean_absolute(x: Tensor, e: float) -> Tensor:
    d = deviations(x)
    return x * torch.sigmoid(d**2 / (4 * (d.abs().mean(MAP, keepdim=True) + e)) + 0.5)


def returns_one_element(x: Tensor, e: float) -> Tensor:
    if x.shape[2] * x.shape[3] <= 1:
        return x
    return x * torch.sigmoid(inverse_energy(x, e))


def local(x: Tensor, e: float) -> Tensor:
    mean = nnf.avg_pool2d(x, 3, 1, 1)
    square = (x - mean) ** 2
    return x * torch.sigmoid(square / (4 * (nnf.avg_pool2d(square, 3, 1, 1) + e)) + 0.5)


class Ignored(nn.Module):
    """A constructor's lambda that is kept as an attribute and not used."""

    def __init__(self, channels: int = 1, e_lambda: float = 0.1) -> None:
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(inverse_energy(x, 1e-4))


class Dropped(nn.Module):
    """A constructor's lambda that is not even kept."""

    def __init__(self, e_lambda: float = 1e-4) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(inverse_energy(x, 1e-4))


class LearnedScale(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x * torch.sigmoid(inverse_energy(x, 1e-4))


class LearnedLambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e_lambda = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(inverse_energy(x, self.e_lambda))


class WithNorm(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(inverse_energy(self.norm(x), 1e-4))


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x * torch.sigmoid(inverse_energy(x, 1e-4)))


class UnusedParameter(Authors):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Counting(nn.Module):
    """Output that depends on earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * torch.sigmoid(inverse_energy(x, 1e-4 * float(self.calls)))


class Printing(Authors):
    def forward(self, x: Tensor) -> Tensor:
        print("calling SimAM on", x.shape)  # noqa: T201
        return super().forward(x)


class Tokens(nn.Module):
    """Input (N, L, C), as transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        return x * torch.sigmoid(inverse_energy(x, 1e-4, 1))


class OneDimensional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        return x * torch.sigmoid(inverse_energy(x, 1e-4, 2))


class FixedSize(nn.Module):
    """Maps of 7 x 7 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 7

    def forward(self, x: Tensor) -> Tensor:
        d = deviations(x.view(x.shape[0], x.shape[1], 7, 7))
        variance = (d**2).sum(MAP, keepdim=True) / 48
        return x * torch.sigmoid(d**2 / (4 * (variance + 1e-4)) + 0.5)


@dataclass(frozen=True)
class Copy:
    make: Callable[[], nn.Module]
    formula: str
    e_lambda: float | None
    difference: tuple[str, ...] = ()

    @staticmethod
    def of(function: Any, *difference: str, e_lambda: float | None = 0.1) -> "Copy":
        return Copy(lambda: Formula(function, 0.1), "other", e_lambda, difference)


HALF = "overflow"
ONE = "one element"

COPIES = {
    "authors": Copy(Authors, "shared", 1e-4, (ONE, HALF)),
    "authors, lambda 0.1": Copy(lambda: Authors(64, 0.1), "shared", 0.1, (ONE, HALF)),
    "flattened": Copy(AuthorsFlat, "shared", 1e-4, (ONE, HALF)),
    "einsum": Copy(AuthorsEinsum, "shared", 0.01, (ONE, HALF)),
    "leave one out": Copy(LeaveOneOut, "leave_one_out", 1e-4, (ONE, HALF)),
    "printing": Copy(Printing, "shared", 1e-4, (ONE, HALF)),
    "one-dimensional": Copy(OneDimensional, "shared", 1e-4, (ONE,)),
    "fixed size": Copy(FixedSize, "shared", 1e-4, ("7x7",)),
    "in float32": Copy(lambda: Formula(single, 0.1), "shared", 0.1, ("float32",)),
    "lambda outside": Copy(
        lambda: Formula(outside, 0.1), "shared", 0.025, ("outside the factor 4",)
    ),
    "ignored lambda": Copy(Ignored, "shared", 1e-4, ("ignore",)),
    "dropped lambda": Copy(Dropped, "shared", 1e-4, ("ignore",)),
    "unused parameter": Copy(UnusedParameter, "shared", 1e-4, ("weight",)),
    "over M": Copy.of(over_m, "by M instead of M - 1"),
    "over M - 2": Copy.of(over_m_minus_2, "by M - 2 instead of M - 1"),
    "over width": Copy.of(over_width, "W * W - 1"),
    "undivided": Copy.of(undivided, "does not divide the sum of squares"),
    "lambda once": Copy.of(lambda_once, "lambda once instead of twice"),
    "lambda divided": Copy.of(lambda_divided, "so that lambda is divided"),
    "no lambda": Copy.of(no_lambda, "no lambda", e_lambda=None),
    "floor": Copy.of(floor, "a floor of 0.1 ", "in place of lambda", e_lambda=None),
    "floor and lambda": Copy.of(floor_and_lambda, "a floor of 0.001"),
    "pooled": Copy.of(pooled, "sums the numerator over the map"),
    "no sigmoid": Copy.of(no_sigmoid, "no sigmoid"),
    "tanh": Copy.of(tanh, "tanh"),
    "hard sigmoid": Copy.of(hard_sigmoid, "hardsigmoid"),
    "softplus": Copy.of(softplus, "softplus"),
    "softmax": Copy.of(softmax, "softmax"),
    "no half": Copy.of(no_half, "no 1/2"),
    "half in the denominator": Copy.of(half_in_denominator, "1/2 inside the denominator"),
    "one for half": Copy.of(one_for_half, "adds 1 instead of 1/2"),
    "inverted": Copy.of(inverted, "order is inverted"),
    "signed": Copy.of(signed, "signed deviation"),
    "absolute": Copy.of(absolute, "absolute deviation"),
    "standard deviation": Copy.of(standard_deviation, "standard deviation"),
    "root": Copy.of(root, "square root of the variance plus lambda"),
    "factor two": Copy.of(factor_two, "factor 2 instead of 4"),
    "temperature": Copy.of(temperature, "multiplies 1/e by 0.5"),
    "over channels": Copy.of(over_channels, "over the channels"),
    "over rows": Copy.of(over_rows, "over the last axis only"),
    "over columns": Copy.of(over_columns, "over axis 2 only"),
    "over the batch": Copy.of(over_batch, "over the batch"),
    "over the sample": Copy.of(over_sample, "all channels"),
    "over groups": Copy.of(over_groups, "groups of 4 channels"),
    "channels last": Copy.of(channels_last, "last axis were the channels"),
    "tokens": Copy(Tokens, "other", 1e-4, ("last axis were the channels",)),
    "two axes": Copy.of(mean_of_map_variance_of_sample, "variance", "all channels"),
    "median": Copy.of(median, "median"),
    "maximum": Copy.of(maximum, "maximum"),
    "uncentred": Copy.of(uncentred, "does not subtract the mean"),
    "gate": Copy.of(gate, "returns the gate"),
    "residual": Copy.of(residual, "x + x * gate"),
    "added gate": Copy.of(added_gate, "x + gate"),
    "reversed gate": Copy.of(reversed_gate, "takes 1 - gate"),
    "scaled": Copy.of(scaled, "multiplies the product by 1.5"),
    "pair": Copy.of(pair, "returns a tuple"),
    "in place": Copy.of(in_place, "overwrites its input"),
    "detached gate": Copy.of(detached_gate, "gradient"),
    "bfloat16": Copy.of(bfloat16, "bfloat16"),
    "noisy": Copy.of(noisy, "random", e_lambda=None),
    "leave-one-out mean": Copy.of(loo_mean_only, "mean of the other neurons"),
    "leave-one-out unbiased": Copy.of(loo_unbiased, "leave-one-out", "by M - 2"),
    "energy plus 1/2": Copy.of(energy_plus_half, "order is inverted", "adds 0.5 to the energy"),
    "lambda four times": Copy.of(lambda_four_times, "lambda 4 times instead of twice"),
    "share of lambda": Copy.of(share_of_lambda, "sums the numerator", "no sigmoid", "no 1/2"),
    "fixed count": Copy.of(fixed_count, "by 48 on maps of every size"),
    "cut": Copy.of(cut, "limits the gate to at most 0.9526"),
    "mean absolute": Copy.of(mean_absolute, "mean absolute deviation instead of the variance"),
    "returns one element": Copy.of(returns_one_element, "a map of one element unchanged"),
    "local": Copy.of(local, "window", e_lambda=None),
    "learned scale": Copy(LearnedScale, "other", 1e-4, ("parameters", "gamma")),
    "learned lambda": Copy(LearnedLambda, "other", 0.1, ("parameters", "e_lambda")),
    "batch norm": Copy(WithNorm, "other", 0.000100001, ("training mode",)),
    "dropout": Copy(WithDropout, "other", 1e-4, ("random", "training mode")),
    "counting": Copy(Counting, "other", None, ("earlier calls",)),
    "gate, over M, no half": Copy.of(
        gate_over_m, "returns the gate", "by M instead of M - 1", "no 1/2"
    ),
    "residual, signed, rows, over M": Copy.of(
        residual_signed_rows, "x + x * gate", "signed", "last axis only", "by M instead of M - 1"
    ),
}
