"""What the tests of the kernels share: maps in rows and in strips, and the comparison."""

from types import ModuleType

import torch
from torch import Tensor

from simam import reference
from tests.helpers.oracles import rounding, working_rounding


def check(
    kernel: ModuleType,
    x: Tensor,
    pull: Tensor,
    e_lambda: float,
    statistics: str,
    *,
    truncates: bool = False,
) -> tuple[float, float]:
    """Compare a kernel with float64, and return the errors relative to what rounding may do.

    Or truncation, where that is how the last step to half precision is taken.
    """
    dtype = x.dtype
    step = rounding(dtype) + truncates * torch.finfo(dtype).eps / 2
    actual = kernel.forward(x, e_lambda, statistics)
    gradient = kernel.backward(pull, x, e_lambda, statistics)
    assert actual.dtype == gradient.dtype == dtype
    assert actual.stride() == gradient.stride() == torch.empty_like(x).stride()
    wide = x.double()
    expected = reference.forward(wide, e_lambda, statistics)
    expected_gradient = reference.backward(pull.double(), wide, e_lambda, statistics)

    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = step * expected.abs() + tiny
    # The terms of the gradient, g s and g x s (1 - s) over the standard deviation, may cancel.
    channels = wide.flatten(2)
    spread = (channels.var(2, correction=min(1, channels.shape[2] - 1)) + e_lambda).sqrt()
    unit = pull.double().abs().max() * (1 + channels.abs().amax(2) / spread)
    unit = unit.reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    allowed_gradient = step * expected_gradient.abs() + working_rounding(dtype) * unit
    errors = (
        ((actual.double() - expected).abs() / allowed).max().item(),
        ((gradient.double() - expected_gradient).abs() / (allowed_gradient + tiny)).max().item(),
    )
    assert max(errors) <= 1, (tuple(x.shape), x.stride(), dtype, e_lambda, statistics, errors)
    return errors


def lay_out(x: Tensor, strips: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if strips else x.contiguous()


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
