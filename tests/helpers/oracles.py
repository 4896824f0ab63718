"""Slow, plain answers to check the library by. Nothing here comes from it.

A channel is a list of floats, its neurons in order. `statistics` takes moments of fractions in
exact arithmetic, so that a comparison allows for the rounding of the library alone.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from statistics import mean, pvariance, variance

import torch
from torch import Tensor


def each_channel(function: Callable[..., list], x: Tensor, *args: float) -> Tensor:
    """A function of one channel at every channel of x (Tensor[N, C, *spatial]), in float64."""
    samples = x.detach().double().cpu().flatten(2).tolist()
    values = [[function(channel, *args) for channel in sample] for sample in samples]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def shared(channel: list[float], e_lambda: float) -> list[float]:
    """The energies with one mean and one variance, S / (M - 1), for the whole channel."""
    neurons = [Fraction(value) for value in channel]
    spread = (variance(neurons) if len(neurons) > 1 else 0) + Fraction(e_lambda)
    centre = mean(neurons)
    energies = []
    for t in neurons:
        energies.append(float(4 * spread / ((t - centre) ** 2 + 2 * spread)))
    return energies


def leave_one_out(channel: list[float], e_lambda: float) -> list[float]:
    """The energies with the mean and the biased variance of the other neurons."""
    if len(channel) == 1:
        return [2.0]
    energies = []
    for index in range(len(channel)):
        t, centre, spread = _others(channel, index, e_lambda)
        energies.append(float(4 * spread / ((t - centre) ** 2 + 2 * spread)))
    return energies


ENERGY = {"shared": shared, "leave_one_out": leave_one_out}


def gate(energies: Tensor) -> Tensor:
    return torch.sigmoid(1 / energies)


def definition(
    w: Fraction, b: Fraction, channel: list[float], index: int, e_lambda: float
) -> Fraction:
    """The energy e_t(w, b) of one neuron, exactly."""
    t, *others = map(Fraction, [channel[index], *channel[:index], *channel[index + 1 :]])
    misfit = mean((-1 - (w * x + b)) ** 2 for x in others)
    return misfit + (1 - (w * t + b)) ** 2 + Fraction(e_lambda) * w**2


def minimiser(channel: list[float], index: int, e_lambda: float) -> tuple[Fraction, Fraction]:
    """The closed form of the (w, b) that minimises a neuron's energy, exactly."""
    t, centre, spread = _others(channel, index, e_lambda)
    w = 2 * (t - centre) / ((t - centre) ** 2 + 2 * spread)
    return w, -(t + centre) * w / 2


def brute_force(channel: list[float], index: int, e_lambda: float) -> tuple[float, float, float]:
    """The (w, b) that minimises a neuron's energy and the minimum, by least squares.

    The origin and the units are free, since b absorbs the one and w and lambda the other. Taken
    at the channel's mean and at the columns' norms they leave a well-conditioned system at
    every offset, scale and lambda; in the given units float64 would not see the small column.
    """
    origin = float(mean(channel))
    rows = [[x - origin, 1.0] for x in channel] + [[math.sqrt(e_lambda), 0.0]]
    labels = [[-1.0] for _ in channel] + [[0.0]]
    weights = [[1 / (len(channel) - 1)] for _ in channel] + [[1.0]]
    labels[index], weights[index] = [1.0], [1.0]

    root = torch.tensor(weights, dtype=torch.float64).sqrt()
    system = torch.tensor(rows, dtype=torch.float64) * root
    target = torch.tensor(labels, dtype=torch.float64) * root
    norms = system.norm(dim=0)
    solution = torch.linalg.lstsq(system / norms, target, driver="gelsd").solution
    energy = (system / norms @ solution - target).square().sum()
    w, b = (solution[:, 0] / norms).tolist()
    return w, b - w * origin, float(energy)


def rounding(dtype: torch.dtype) -> float:
    """The relative error to allow in a result: that of its arithmetic and of its last step."""
    half = dtype in (torch.float16, torch.bfloat16)
    return working_rounding(dtype) + half * torch.finfo(dtype).eps / 2


def working_rounding(dtype: torch.dtype) -> float:
    """A dozen roundings, few of them in the same direction, in float32 or float64."""
    return 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_close(actual: Tensor, expected: Tensor, absolute: float = 0.0) -> None:
    """Equal but for the rounding of actual's dtype, and an absolute error where one is due."""
    info = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=rounding(actual.dtype),
        atol=max(absolute, info.smallest_normal * info.eps / 2),
    )


def _others(
    channel: list[float], index: int, e_lambda: float
) -> tuple[Fraction, Fraction, Fraction]:
    """t, and of the other neurons the mean and the biased variance, plus lambda."""
    others = [Fraction(value) for value in channel[:index] + channel[index + 1 :]]
    return Fraction(channel[index]), mean(others), pvariance(others) + Fraction(e_lambda)


def shared_gradient(channel: list[float], pull: list[float], e_lambda: float) -> list[float]:
    """The gradient of the shared form for one channel, pulled back from that of its output."""
    positions = len(channel)
    centre = mean(map(Fraction, channel))
    deviations = [float(Fraction(x) - centre) for x in channel]
    others = max(1, positions - 1)
    q = 1 / (4 * (math.fsum(d * d for d in deviations) / others + e_lambda))
    gates = [1 / (1 + math.exp(-(d * d * q + 0.5))) for d in deviations]
    terms = [g * x * s * (1 - s) for g, x, s in zip(pull, channel, gates, strict=True)]
    a = math.fsum(t * d * d for t, d in zip(terms, deviations, strict=True))
    b = math.fsum(t * d for t, d in zip(terms, deviations, strict=True))
    return [
        g * s + 2 * q * (t * d - b / positions) - 8 * q * q * a / others * d
        for g, s, t, d in zip(pull, gates, terms, deviations, strict=True)
    ]
