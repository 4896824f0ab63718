"""Slow, plain answers to check the library against. Nothing here is imported from the library.

A channel is a list of floats, its neurons in order. Moments are computed with fractions, in exact
arithmetic, so a comparison only has to allow for the rounding errors of the library.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from statistics import mean, pvariance, variance

import torch
from torch import Tensor


def each_channel(function: Callable[..., list], x: Tensor, *args: float) -> Tensor:
    """Apply a function to each channel of x (Tensor[N, C, *spatial]), in float64."""
    samples = x.detach().double().cpu().flatten(2).tolist()
    values = [[function(channel, *args) for channel in sample] for sample in samples]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def shared(channel: list[float], e_lambda: float) -> list[float]:
    """Compute the energies with one mean and one variance, S / (M - 1), for the whole channel."""
    neurons = [Fraction(value) for value in channel]
    mu = mean(neurons)
    v = (variance(neurons) if len(neurons) > 1 else 0) + Fraction(e_lambda)
    return [float(4 * v / ((t - mu) ** 2 + 2 * v)) for t in neurons]


def leave_one_out(channel: list[float], e_lambda: float) -> list[float]:
    """Compute the energies with the mean and the biased variance of the other neurons."""
    if len(channel) == 1:
        return [2.0]
    energies = []
    for index in range(len(channel)):
        t, mu, v = _leave_out(channel, index, e_lambda)
        energies.append(float(4 * v / ((t - mu) ** 2 + 2 * v)))
    return energies


ENERGY = {"shared": shared, "leave_one_out": leave_one_out}


def gate(energies: Tensor) -> Tensor:
    """Compute sigmoid(1 / e*)."""
    return torch.sigmoid(1 / energies)


def energy_function(
    w: Fraction, b: Fraction, channel: list[float], index: int, e_lambda: float
) -> Fraction:
    """Compute the energy e_t(w, b) of one neuron exactly, from its definition."""
    t, *others = map(Fraction, [channel[index], *channel[:index], *channel[index + 1 :]])
    misfit = mean((-1 - (w * x + b)) ** 2 for x in others)
    return misfit + (1 - (w * t + b)) ** 2 + Fraction(e_lambda) * w**2


def minimiser(channel: list[float], index: int, e_lambda: float) -> tuple[Fraction, Fraction]:
    """Compute the (w, b) that minimises a neuron's energy exactly, from its closed form."""
    t, mu, v = _leave_out(channel, index, e_lambda)
    w = 2 * (t - mu) / ((t - mu) ** 2 + 2 * v)
    return w, -(t + mu) * w / 2


def brute_force(channel: list[float], index: int, e_lambda: float) -> tuple[float, float, float]:
    """Compute the (w, b) that minimises a neuron's energy, and the minimum, by least squares.

    The system is centred at the channel's mean, which b absorbs, and its columns are divided by
    their norms, which w and lambda absorb. So it is well-conditioned for every offset, scale and
    lambda. In the given units, the smaller column would be lost in the rounding of float64.
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


def shared_gradient(channel: list[float], grad_output: list[float], e_lambda: float) -> list[float]:
    """Compute the gradient of the shared form with respect to one channel, by plain loops."""
    positions = len(channel)
    mu = mean(map(Fraction, channel))
    deviations = [float(Fraction(x) - mu) for x in channel]
    m_minus_1 = max(1, positions - 1)
    q = 1 / (4 * (math.fsum(d * d for d in deviations) / m_minus_1 + e_lambda))
    gates = [1 / (1 + math.exp(-(d * d * q + 0.5))) for d in deviations]
    terms = [g * x * s * (1 - s) for g, x, s in zip(grad_output, channel, gates, strict=True)]
    a = math.fsum(t * d * d for t, d in zip(terms, deviations, strict=True))
    b = math.fsum(t * d for t, d in zip(terms, deviations, strict=True))
    return [
        g * s + 2 * q * (t * d - b / positions) - 8 * q * q * a / m_minus_1 * d
        for g, s, t, d in zip(grad_output, gates, terms, deviations, strict=True)
    ]


def rounding(dtype: torch.dtype) -> float:
    """Return the relative error to allow: that of the arithmetic, and of rounding to dtype."""
    half = dtype in (torch.float16, torch.bfloat16)
    return working_rounding(dtype) + half * torch.finfo(dtype).eps / 2


def working_rounding(dtype: torch.dtype) -> float:
    """Return the relative error to allow in the float32 or float64 arithmetic behind dtype.

    The arithmetic has a dozen roundings, few of them in the same direction.
    """
    return 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_close(actual: Tensor, expected: Tensor, absolute: float = 0.0) -> None:
    """Assert equality up to the rounding of actual's dtype, or up to an absolute error."""
    info = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=rounding(actual.dtype),
        atol=max(absolute, info.smallest_normal * info.eps / 2),
    )


def _leave_out(
    channel: list[float], index: int, e_lambda: float
) -> tuple[Fraction, Fraction, Fraction]:
    """Return t, and the mean and the biased variance plus lambda of the other neurons."""
    others = [Fraction(value) for value in channel[:index] + channel[index + 1 :]]
    return Fraction(channel[index]), mean(others), pvariance(others) + Fraction(e_lambda)
