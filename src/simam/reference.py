"""The reference: the closed forms of SimAM and the gradient in plain torch operations.

Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for
Convolutional Neural Networks", ICML 2021, equations 3 to 6.

Every function takes a validated x (Tensor[N, C, *spatial]) and computes in float32 or wider. A
channel holds M neurons; d is a neuron's deviation from the channel's mean. With mean mu_t and
biased variance s_t^2 of the other M - 1 neurons,

    1 / e* = (t - mu_t)^2 / (4 (s_t^2 + lambda)) + 1/2,    output = t sigmoid(1 / e*).

Dividing d and sqrt(lambda) by the same number does not change 1 / e*. Here that number is
32 (mean |d| + sqrt(lambda)), so no intermediate result leaves the range of float16, to which
people convert exported graphs; z is the scaled d, lambda_z the scaled lambda. With V the mean of
z^2 and r = 1 / (M - 1), leave-one-out statistics follow from the channel's own:
t - mu_t becomes z (1 + r) and s_t^2 becomes (V - r z^2) (1 + r). Shared statistics, which the
authors ship, are z and V (1 + r).
"""

import math
from typing import Any

import torch
from torch import Tensor


def forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute x times its gate, in x's dtype."""
    wide = widen(x)
    return narrow(wide * torch.sigmoid(_inverse_energy(wide, e_lambda, statistics)), x)


def attention(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gate sigmoid(1 / e*), in x's dtype."""
    return narrow(torch.sigmoid(_inverse_energy(widen(x), e_lambda, statistics)), x)


def energy(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the minimal energy e*, in x's dtype."""
    return narrow(_inverse_energy(widen(x), e_lambda, statistics).reciprocal(), x)


def backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gradient of `forward` with respect to x; the result is differentiable."""
    wide, g = widen(x), widen(grad_output)
    dims, r = _channel_size(wide)
    z, scale, lambda_z = _scaled_deviations(wide, dims, e_lambda)
    mean_sq = (z * z).mean(dims, keepdim=True)
    # u = 1 / e* - 1/2, and its partial derivatives with respect to z and V.
    if statistics == "shared":
        q = 0.25 / (mean_sq * (1 + r) + lambda_z)
        u = z * z * q
        u_z = 2 * z * q
        u_v = -4 * (1 + r) * q * u
    else:
        z_others, variance = _leave_one_out(z, mean_sq, r)
        v = variance + lambda_z
        u = z_others * z_others / (4 * v)
        u_z = z_others / (2 * v) * (1 + r + r * z_others * z_others / v)
        u_v = -(1 + r) * u / v
    gate = torch.sigmoid(u + 0.5)
    g_u = g * wide * gate * (1 - gate)
    g_z = g_u * u_z + 2 * z * (g_u * u_v).mean(dims, keepdim=True)
    return narrow(g * gate + (g_z - g_z.mean(dims, keepdim=True)) / scale, x)


def gate_bounds(positions: int, statistics: str) -> tuple[float, float]:
    """Compute the smallest and the largest possible gate in a channel of M positions.

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
    dims, r = _channel_size(x)
    z, _, lambda_z = _scaled_deviations(x, dims, e_lambda)
    square = z * z
    mean_sq = square.mean(dims, keepdim=True)
    # The constants are floats, because some exporters convert an integer where the graph runs.
    if statistics == "shared":
        return square / (4.0 * (mean_sq * (1.0 + r) + lambda_z)) + 0.5
    z_others, variance = _leave_one_out(z, mean_sq, r)
    return z_others * z_others / (4.0 * (variance + lambda_z)) + 0.5


def _leave_one_out(z: Tensor, mean_sq: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """Compute the scaled t - mu_t and s_t^2, the statistics of the channel's other neurons."""
    rest = mean_sq - z * z * r
    # Where one neuron holds nearly all of V, cancellation may make the difference negative.
    # clamp() would zero the gradient here; subtracting the detached negative part keeps it.
    rest = rest - rest.clamp_max(0.0).detach()
    return z * (1.0 + r), rest * (1.0 + r)


def _scaled_deviations(
    x: Tensor, dims: list[int], e_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, the scale, and lambda / scale^2."""
    d = x - x.mean(dims, keepdim=True)
    mean_abs = d.abs().mean(dims, keepdim=True)
    scale = (mean_abs + math.sqrt(e_lambda)) * 32.0
    # sqrt(lambda) / scale. Its square may round to 0, and so may every z of a channel of equal
    # neurons; 0 / 0 would be NaN.
    root = 1.0 / 32.0 - mean_abs / scale
    lambda_z = (root * root).clamp(min=1e-30)
    # The rounding error of the mean matters where the mean is large against the deviations. The
    # mean of the deviations, which are nearly exact, is that error; subtract it.
    return (d - d.mean(dims, keepdim=True)) / scale, scale, lambda_z


# A float32 or float64 graph must not hold conversions: exporters keep even those without effect.
def widen(x: Tensor) -> Tensor:
    """Return x in the dtype to compute in: float64 as it is, anything else in float32."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()


def narrow(wide: Tensor, x: Tensor) -> Tensor:
    """Return a result in x's dtype."""
    return wide if wide.dtype == x.dtype else wide.to(x.dtype)


def _channel_size(x: Tensor) -> tuple[list[int], float]:
    """Return the spatial dimensions and r = 1 / (M - 1), or r = 1 where M = 1."""
    dims = list(range(2, x.dim()))
    # A channel of one neuron has V = 0, so any r gives 0. There is no branch on M, because an
    # exported graph would keep the branch taken for the example's size.
    if torch.jit.is_scripting() or not torch.jit.is_tracing():
        positions = 1
        for size in x.shape[2:]:
            positions = positions * size
        return dims, 1 / (positions - 1 + 1 // positions)
    else:  # noqa: RET505 - an explicit branch, which TorchScript skips
        # While tracing, sizes are tensors. The shape as one tensor costs an ONNX graph one Shape.
        # Core ML reads neither prod() nor ones(()).
        shape: Any = torch._shape_as_tensor(x)
        count = shape[2]
        for dim in range(3, x.dim()):
            count = count * shape[dim]
        return dims, torch.scalar_tensor(1.0, dtype=x.dtype) / (count - (count > 1).long())
