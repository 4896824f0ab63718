"""The closed forms of SimAM in plain torch operations: the reference that ships.

Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for
Convolutional Neural Networks", ICML 2021, equations 3 to 6.

Every function takes x (Tensor[N, C, *spatial]), already checked, and computes in float32 or
wider. A channel holds M neurons; d is a neuron's deviation from the channel's mean, S the sum
of the d^2. With mean mu_t and biased variance s_t^2 of the other M - 1 neurons,

    1 / e* = (t - mu_t)^2 / (4 (s_t^2 + lambda)) + 1/2,    output = t sigmoid(1 / e*).

Leave-one-out statistics follow from the channel's own sums, t - mu_t = d M / (M - 1) and
s_t^2 = (S - d (t - mu_t)) / (M - 1). Shared statistics, which the authors ship, put d in the
place of t - mu_t and S / (M - 1) in the place of s_t^2.
"""

import math

import torch
from torch import Tensor


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """x times its gate, in x's dtype."""
    wide = _widen(x)
    return (wide * torch.sigmoid(_inverse_energy(wide, e_lambda, statistics))).to(x.dtype)


def attention(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """The gate sigmoid(1 / e*), in x's dtype."""
    return torch.sigmoid(_inverse_energy(_widen(x), e_lambda, statistics)).to(x.dtype)


def energy(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """The minimal energy e*, in x's dtype."""
    return _inverse_energy(_widen(x), e_lambda, statistics).reciprocal().to(x.dtype)


def gate_bounds(positions: int, statistics: str) -> tuple[float, float]:
    """The smallest and the largest gate that a channel with this number of positions can have.

    Examples:
        >>> [round(bound, 4) for bound in gate_bounds(4, "shared")]
        [0.6225, 0.7432]
    """
    lower = 1 / (1 + math.exp(-0.5))
    if statistics == "leave_one_out":
        return lower, 1.0  # a neuron may differ by any amount from a channel that is constant
    return lower, 1 / (1 + math.exp(-((positions - 1) ** 2 / (4 * positions) + 0.5)))


def backward(grad: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """The gradient with respect to x of `forward`, given that of its output; differentiable."""
    wide, g = _widen(x), _widen(grad)
    dims, positions, others = _channel(x)
    d = _centre(wide, dims)
    total = (d * d).sum(dims, keepdim=True)
    # u = 1 / e* - 1/2 and its partial derivatives by d and by S
    if statistics == "shared":
        q = 0.25 / (total / others + e_lambda)
        u = d * d * q
        u_d = 2 * d * q
        u_total = -4 * q * u / others
    else:
        shift, variance = _leave_one_out(d, total, positions, others)
        v = variance + e_lambda
        u = shift * shift / (4 * v)
        u_d = shift / (2 * v) * (positions + shift * shift / v) / others
        u_total = -u / v / others
    gate = torch.sigmoid(u + 0.5)
    g_u = g * wide * gate * (1 - gate)
    g_d = g_u * u_d + 2 * d * (g_u * u_total).sum(dims, keepdim=True)
    return (g * gate + g_d - g_d.mean(dims, keepdim=True)).to(x.dtype)


def _inverse_energy(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    dims, positions, others = _channel(x)
    d = _centre(x, dims)
    square = d * d
    total = square.sum(dims, keepdim=True)
    if statistics == "shared":
        return square / (4 * (total / others + e_lambda)) + 0.5
    shift, variance = _leave_one_out(d, total, positions, others)
    return shift * shift / (4 * (variance + e_lambda)) + 0.5


def _leave_one_out(d: Tensor, total: Tensor, positions: int, others: int) -> tuple[Tensor, Tensor]:
    """t - mu_t and s_t^2 over the other neurons of the channel."""
    shift = d * positions / others
    rest = total - d * shift
    # Where one neuron holds nearly all of S the difference cancels, to below zero by rounding.
    # A clamp would take the derivatives along.
    return shift, (rest - rest.clamp_max(0).detach()) / others


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _centre(x: Tensor, dims: list[int]) -> Tensor:
    d = x - x.mean(dims, keepdim=True)
    # The mean is rounded, which matters where it is large against the deviations. They are
    # nearly exact, so their own mean is that rounding, and takes it away.
    return d - d.mean(dims, keepdim=True)


def _channel(x: Tensor) -> tuple[list[int], int, int]:
    """The spatial dimensions, the number of positions M, and M - 1, but 1 where M = 1."""
    positions = 1
    for size in x.shape[2:]:
        positions = positions * size
    # A channel of one neuron has S = 0, so any divisor serves. Written without a branch, which
    # a traced graph would freeze at the size that it was traced with.
    others = positions - 1 + 1 // positions
    return list(range(2, x.dim())), positions, others
