"""The reference: the closed forms of SimAM and the gradient in plain torch operations.

Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for
Convolutional Neural Networks", ICML 2021, equations 3 to 6.

Every function takes a validated x (Tensor[N, C, *spatial]) and computes in float32 or wider. A
channel holds M neurons; d is a neuron's deviation from the channel's mean, S the sum of the d^2.
With mean mu_t and biased variance s_t^2 of the other M - 1 neurons,

    1 / e* = (t - mu_t)^2 / (4 (s_t^2 + lambda)) + 1/2,    output = t sigmoid(1 / e*).

Leave-one-out statistics follow from the channel's own sums, t - mu_t = d M / (M - 1) and
s_t^2 = (S - d (t - mu_t)) / (M - 1). Shared statistics, which the authors ship, replace t - mu_t
by d and s_t^2 by S / (M - 1).
"""

import math

import torch
from torch import Tensor


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute x times its gate, in x's dtype."""
    wide = _widen(x)
    return (wide * torch.sigmoid(_inverse_energy(wide, e_lambda, statistics))).to(x.dtype)


def attention(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gate sigmoid(1 / e*), in x's dtype."""
    return torch.sigmoid(_inverse_energy(_widen(x), e_lambda, statistics)).to(x.dtype)


def energy(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the minimal energy e*, in x's dtype."""
    return _inverse_energy(_widen(x), e_lambda, statistics).reciprocal().to(x.dtype)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient of `forward` with respect to x; the result is differentiable."""
    wide, g = _widen(x), _widen(grad_output)
    dims, positions, m_minus_1 = _channel_size(x)
    d = _deviations(wide, dims)
    sum_sq = (d * d).sum(dims, keepdim=True)
    # u = 1 / e* - 1/2, and its partial derivatives with respect to d and S.
    if statistics == "shared":
        q = 0.25 / (sum_sq / m_minus_1 + e_lambda)
        u = d * d * q
        u_d = 2 * d * q
        u_s = -4 * q * u / m_minus_1
    else:
        d_others, variance = _leave_one_out(d, sum_sq, positions, m_minus_1)
        v = variance + e_lambda
        u = d_others * d_others / (4 * v)
        u_d = d_others / (2 * v) * (positions + d_others * d_others / v) / m_minus_1
        u_s = -u / v / m_minus_1
    gate = torch.sigmoid(u + 0.5)
    g_u = g * wide * gate * (1 - gate)
    g_d = g_u * u_d + 2 * d * (g_u * u_s).sum(dims, keepdim=True)
    return (g * gate + g_d - g_d.mean(dims, keepdim=True)).to(x.dtype)


def gate_bounds(positions: int, statistics: str) -> tuple[float, float]:
    """Compute the smallest and the largest gate that a channel of so many positions can hold.

    Args:
        positions (int): M, the neurons of a channel.
        statistics (str): "shared" or "leave_one_out".

    Returns:
        tuple[float, float]: sigmoid(1/2), and with shared statistics
        sigmoid((M - 1)^2 / (4 M) + 1/2). With leave-one-out statistics the upper bound is 1: a
        neuron may stand out from a constant channel by any amount.

    Examples:
        >>> [round(bound, 4) for bound in gate_bounds(4, "shared")]
        [0.6225, 0.7432]
    """
    lower = 1 / (1 + math.exp(-0.5))
    if statistics == "leave_one_out":
        return lower, 1.0
    return lower, 1 / (1 + math.exp(-((positions - 1) ** 2 / (4 * positions) + 0.5)))


def _inverse_energy(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    dims, positions, m_minus_1 = _channel_size(x)
    d = _deviations(x, dims)
    square = d * d
    sum_sq = square.sum(dims, keepdim=True)
    if statistics == "shared":
        return square / (4 * (sum_sq / m_minus_1 + e_lambda)) + 0.5
    d_others, variance = _leave_one_out(d, sum_sq, positions, m_minus_1)
    return d_others * d_others / (4 * (variance + e_lambda)) + 0.5


def _leave_one_out(
    d: Tensor, sum_sq: Tensor, positions: int, m_minus_1: int
) -> tuple[Tensor, Tensor]:
    """Compute t - mu_t and s_t^2, the statistics of the other neurons of the channel."""
    d_others = d * positions / m_minus_1
    rest = sum_sq - d * d_others
    # Where one neuron holds nearly all of S, cancellation may make the difference negative.
    # clamp() would zero the gradient here; subtracting the detached negative part keeps it.
    return d_others, (rest - rest.clamp_max(0).detach()) / m_minus_1


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _deviations(x: Tensor, dims: list[int]) -> Tensor:
    d = x - x.mean(dims, keepdim=True)
    # The rounding error of the mean matters where the mean is large against the deviations. The
    # mean of the deviations, which are nearly exact, is that error; subtract it.
    return d - d.mean(dims, keepdim=True)


def _channel_size(x: Tensor) -> tuple[list[int], int, int]:
    """Return the spatial dimensions, the number of positions M, and M - 1, or 1 where M = 1."""
    positions = 1
    for size in x.shape[2:]:
        positions = positions * size
    # A channel of one neuron has S = 0, so any divisor gives 0. There is no branch, because a
    # traced graph would keep the branch taken for the traced size.
    m_minus_1 = positions - 1 + 1 // positions
    return list(range(2, x.dim())), positions, m_minus_1
