"""Helpers of the kernel tests: the comparison with float64, and maps in both layouts."""

from types import ModuleType

import torch
from torch import Tensor

from simam import reference
from tests.helpers.oracles import rounding, working_rounding


def check(
    kernel: ModuleType,
    x: Tensor,
    grad_output: Tensor,
    e_lambda: float,
    statistics: str,
    *,
    truncates: bool = False,
) -> tuple[float, float]:
    """Compare both passes of a kernel with the reference in float64.

    Returns the largest error of each pass as a fraction of what rounding allows. `truncates`
    allows for kernels that truncate to half precision instead of rounding.
    """
    dtype = x.dtype
    step = rounding(dtype) + truncates * torch.finfo(dtype).eps / 2
    actual = kernel.forward(x, e_lambda, statistics)
    gradient = kernel.backward(grad_output, x, e_lambda, statistics)
    assert actual.dtype == gradient.dtype == dtype
    assert actual.stride() == gradient.stride() == torch.empty_like(x).stride()
    wide = x.double()
    expected = reference.forward(wide, e_lambda, statistics)
    expected_gradient = reference.backward(grad_output.double(), wide, e_lambda, statistics)

    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = step * expected.abs() + tiny
    # The terms of the gradient may cancel. Their sizes are those of g s, and of g x s (1 - s)
    # divided by the standard deviation.
    channels = wide.flatten(2)
    std = (channels.var(2, correction=min(1, channels.shape[2] - 1)) + e_lambda).sqrt()
    unit = grad_output.double().abs().max() * (1 + channels.abs().amax(2) / std)
    unit = unit.reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    allowed_gradient = step * expected_gradient.abs() + working_rounding(dtype) * unit
    errors = (
        ((actual.double() - expected).abs() / allowed).max().item(),
        ((gradient.double() - expected_gradient).abs() / (allowed_gradient + tiny)).max().item(),
    )
    assert max(errors) <= 1, (tuple(x.shape), x.stride(), dtype, e_lambda, statistics, errors)
    return errors


def lay_out(x: Tensor, channels_last: bool) -> Tensor:
    """Return x in the channels-last or the contiguous layout."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return reproducible normally distributed float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
