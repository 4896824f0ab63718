"""SimAM whose statistics count a part of the positions, as for padded batches, in plain torch.

Every function takes a validated x (Tensor[N, C, *spatial]) and a mask (bool, broadcastable to
(N, 1, *spatial)); True counts. `reference` has the closed forms. Here M is the number of counted
positions of a sample. To a position that is not counted, all counted ones are the others.
"""

import torch
from torch import Tensor

from .reference import narrow, widen


def forward(x: Tensor, mask: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute x times its gate, in x's dtype."""
    wide = widen(x)
    usable = mask | wide.isfinite()
    finite = torch.where(usable, wide, 0.0)
    gate = _gate(finite, mask, e_lambda, statistics)
    # NaN and inf outside the mask must not reach counted positions through the gradient either.
    return narrow(torch.where(usable, finite * gate, wide * gate.detach()), x)


def attention(x: Tensor, mask: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the gate sigmoid(1 / e*), in x's dtype."""
    return narrow(_gate(widen(x), mask, e_lambda, statistics), x)


def energy(x: Tensor, mask: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute the minimal energy e*, in x's dtype."""
    ratio = _ratio(widen(x), mask, e_lambda, statistics)
    return narrow((ratio * ratio + 0.5).reciprocal(), x)


def _gate(x: Tensor, mask: Tensor, e_lambda: float, statistics: str) -> Tensor:
    # Where r is larger, the gate is 1 in every dtype. The bound keeps the derivatives finite.
    ratio = _ratio(x, mask, e_lambda, statistics).clamp(-1e4, 1e4)
    return torch.sigmoid(ratio * ratio + 0.5)


def _ratio(x: Tensor, mask: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Compute r = (t - mu_t) / sqrt(4 (s_t^2 + lambda)), so that 1 / e* = r^2 + 1/2."""
    dims = list(range(2, x.dim()))
    mask = mask.expand([x.shape[0], 1] + list(x.shape[2:]))  # noqa: RUF005 - for TorchScript
    positions = mask.sum(dims, keepdim=True).to(x.dtype)
    divisor, m_minus_1 = positions.clamp_min(1), (positions - 1).clamp_min(1)

    d = x - _sum(x, mask, dims) / divisor
    d = d - _sum(d, mask, dims) / divisor  # the rounding error of the mean
    sum_sq = _sum(d * d, mask, dims)
    if statistics == "shared":
        variance = sum_sq / m_minus_1
    else:
        counted = torch.where(mask, d, 0.0)
        d_others = counted * positions / m_minus_1
        rest = sum_sq - counted * d_others
        # clamp() would zero the gradient here; subtracting the detached negative part keeps it.
        of_counted = (rest - rest.clamp_max(0).detach()) / m_minus_1
        variance = torch.where(mask, of_counted, sum_sq / divisor)
        d = torch.where(mask, d_others, d)
    ratio = d * torch.rsqrt(4 * (variance + e_lambda))
    return torch.where(positions > 0, ratio, 0.0)


def _sum(x: Tensor, mask: Tensor, dims: list[int]) -> Tensor:
    """Sum the counted positions of every channel."""
    return torch.where(mask, x, 0.0).sum(dims, keepdim=True)
