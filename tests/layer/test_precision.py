"""Rounding errors: half precision, maps far from zero, large maps."""

import math

import pytest
import torch
from torch import Tensor

from simam import functional as F
from tests.helpers import oracles
from tests.helpers.oracles import assert_close, working_rounding

pytestmark = pytest.mark.usefixtures("implementation")

HALVES = (torch.float16, torch.bfloat16)
FUNCTIONS = ("simam", "attention", "energy")
STATISTICS = ("shared", "leave_one_out")

both_statistics = pytest.mark.parametrize("statistics", STATISTICS)


@both_statistics
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("std", [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_functional_half_precision_is_within_one_ulp(
    statistics: str, dtype: torch.dtype, std: float, mean: float, device: torch.device
) -> None:
    # The mean is in units of std. Float16 can hold 4.5 standard deviations of 1e4.
    x = (std * (normal(1, 4, 7, 7).clamp(-4.5, 4.5) + mean)).to(dtype)
    expected = reference(x, 0.1, statistics)
    for name in FUNCTIONS:
        actual = getattr(F, name)(x.to(device), 0.1, statistics=statistics)
        assert actual.dtype == dtype
        assert ulps(actual.cpu(), expected[name].to(dtype)) <= 1, name


# From a standard deviation of 100 on, the sum of squares of such a map overflows float16. A mean
# taken in half precision would be inaccurate far earlier.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("std", [10.0, 100.0, 1e4])
def test_functional_half_precision_on_a_large_map(
    dtype: torch.dtype, std: float, device: torch.device
) -> None:
    x = (std * (normal(1, 2, 56, 56).clamp(-4.5, 4.5) + 1)).to(dtype)
    expected = reference(x, 1e-4, "shared")
    for name in FUNCTIONS:
        actual = getattr(F, name)(x.to(device), 1e-4)
        assert ulps(actual.cpu(), expected[name].to(dtype)) <= 1, name


@both_statistics
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("std", [1e-2, 1.0, 1e2])
def test_simam_half_precision_gradient_is_rounded_once(
    statistics: str, dtype: torch.dtype, std: float, device: torch.device
) -> None:
    x = (std * normal(2, 3, 7, 7)).to(dtype)
    grad_output = normal(2, 3, 7, 7, seed=1).to(dtype)
    wide = x.double().requires_grad_()
    output = F.simam(wide, 1e-4, statistics=statistics)
    (expected,) = torch.autograd.grad(output, wide, grad_output.double())
    leaf = x.to(device).requires_grad_()
    output = F.simam(leaf, 1e-4, statistics=statistics)
    (actual,) = torch.autograd.grad(output, leaf, grad_output.to(device))
    assert actual.dtype == dtype
    # The terms of the gradient are of order 1 and may cancel, so the error of a float32 sum shows.
    assert_close(actual, expected, absolute=8 * working_rounding(dtype))


@both_statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_functional_is_accurate_far_from_zero(
    statistics: str, dtype: torch.dtype, mean: float, device: torch.device
) -> None:
    x = (normal(1, 4, 14, 14) + mean).to(dtype)
    expected = reference(x, 1e-4, statistics)
    for name in FUNCTIONS:
        assert_close(getattr(F, name)(x.to(device), statistics=statistics), expected[name])


@both_statistics
@pytest.mark.parametrize("value", [0.1, 1e3 / 3, -1e6 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_of_a_constant_map(
    statistics: str, value: float, dtype: torch.dtype, device: torch.device
) -> None:
    # The rounded sum of 13 * 17 equal values, divided by 13 * 17, is seldom that value.
    x = torch.full((1, 2, 13, 17), value, dtype=dtype, device=device)
    gate = torch.full_like(x, 1 / (1 + math.exp(-0.5)))
    assert_close(F.attention(x, 1e-8, statistics=statistics), gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functional_on_a_large_map(dtype: torch.dtype, device: torch.device) -> None:
    x = (normal(1, 1, 224, 224) + 1e3).to(dtype)
    expected = reference(x, 1e-4, "shared")
    for name in FUNCTIONS:
        assert_close(getattr(F, name)(x.to(device)), expected[name])


@both_statistics
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_functional_keeps_the_dtype(
    statistics: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = normal(1, 2, 3, 4).to(device, dtype)
    for name in FUNCTIONS:
        assert getattr(F, name)(x, statistics=statistics).dtype == dtype


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(x: Tensor, e_lambda: float, statistics: str) -> dict[str, Tensor]:
    energies = oracles.each_channel(oracles.ENERGY[statistics], x, e_lambda)
    gate = oracles.gate(energies)
    return {"simam": x.double() * gate, "attention": gate, "energy": energies}


def ulps(actual: Tensor, expected: Tensor) -> int:
    """Return the largest distance in representable numbers; NaN and infinity are far away."""
    return int((_rank(actual) - _rank(expected)).abs().max())


def _rank(x: Tensor) -> Tensor:
    # The bits of a float's magnitude, read as an integer, count the floats between zero and it.
    return x.abs().view(torch.int16).int() * torch.where(x < 0, -1, 1)
