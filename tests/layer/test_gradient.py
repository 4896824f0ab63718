"""The gradient: its closed form against autograd, a plain loop and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simam import functional as F
from simam import reference
from tests.helpers import oracles
from tests.helpers.oracles import rounding, working_rounding
from tests.helpers.strategies import DTYPES, lambdas, maps, to_device

each_implementation = pytest.mark.usefixtures("implementation")

STATISTICS = ("shared", "leave_one_out")
statistics = st.sampled_from(STATISTICS)
seeds = st.integers(0, 2**32)
scales = (1e-3, 1.0, 1e3)


@given(x=maps(DTYPES, scales), e_lambda=lambdas, statistics=statistics, seed=seeds)
def test_reference_backward_matches_autograd(
    x: Tensor, e_lambda: float, statistics: str, seed: int, device: torch.device
) -> None:
    grad_output = random_like(x, seed)
    wide = x.double().requires_grad_()
    output = reference.forward(wide, e_lambda, statistics)
    (expected,) = torch.autograd.grad(output, wide, grad_output.double())
    actual = reference.backward(grad_output.to(device), to_device(x, device), e_lambda, statistics)
    assert actual.dtype == x.dtype
    assert_close(actual, expected, unit(x, grad_output, e_lambda))


@each_implementation
@given(x=maps(DTYPES, scales), e_lambda=lambdas, statistics=statistics, seed=seeds)
def test_simam_gradient_matches_reference_backward(
    x: Tensor, e_lambda: float, statistics: str, seed: int, device: torch.device
) -> None:
    grad_output = random_like(x, seed)
    expected = reference.backward(grad_output.double(), x.double(), e_lambda, statistics)
    leaf = to_device(x, device).requires_grad_()
    output = F.simam(leaf, e_lambda, statistics=statistics)
    (actual,) = torch.autograd.grad(output, leaf, grad_output.to(device))
    assert actual.dtype == x.dtype
    assert_close(actual, expected, unit(x, grad_output, e_lambda))


@given(x=maps(scales=scales), e_lambda=lambdas, seed=seeds)
def test_reference_backward_matches_a_plain_loop(x: Tensor, e_lambda: float, seed: int) -> None:
    x = x.double()
    grad_output = random_like(x, seed)
    actual = reference.backward(grad_output, x, e_lambda, "shared").flatten(2)
    for n, sample in enumerate(x.flatten(2)):
        for c, channel in enumerate(sample):
            g = grad_output.flatten(2)[n, c]
            expected = oracles.shared_gradient(channel.tolist(), g.tolist(), e_lambda)
            expected = torch.tensor(expected, dtype=torch.float64)
            assert_close(actual[n, c], expected, unit(channel[None, None], g, e_lambda)[0, 0])


# At these scales and lambdas the gate varies over lengths of at least 0.1, so the difference
# quotient is accurate to 1e-9: rounding contributes 1e-16 / step, curvature step^2.
@each_implementation
@given(
    x=maps(dtypes=(torch.float64,), scales=(1.0,), offsets=(0.0, 1.0)),
    e_lambda=st.floats(0.1, 10),
    statistics=statistics,
    seed=seeds,
)
@settings(max_examples=50)
def test_simam_gradient_matches_finite_differences(
    x: Tensor, e_lambda: float, statistics: str, seed: int, device: torch.device
) -> None:
    def loss(values: Tensor) -> Tensor:
        energies = oracles.each_channel(oracles.ENERGY[statistics], values, e_lambda)
        return (grad_output * values * oracles.gate(energies)).sum()

    grad_output, direction = random_like(x, seed), random_like(x, seed + 1)
    step = 1e-5
    expected = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    leaf = to_device(x, device).requires_grad_()
    output = F.simam(leaf, e_lambda, statistics=statistics)
    (gradient,) = torch.autograd.grad(output, leaf, grad_output.to(device))
    actual = (gradient.cpu() * direction).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_reference_backward_is_differentiable(statistics: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    grad_output = random_like(x, seed=1).requires_grad_()

    def backward(grad_output: Tensor, x: Tensor) -> Tensor:
        return reference.backward(grad_output, x, 0.1, statistics)

    assert torch.autograd.gradcheck(backward, (grad_output, x))


@each_implementation
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("rank", [3, 4, 5, 6])
def test_simam_gradient_of_a_single_position_is_its_gate(
    statistics: str, rank: int, device: torch.device
) -> None:
    x = torch.full([2, 3] + [1] * (rank - 2), 7.0, device=device, requires_grad=True)
    grad_output = random_like(x, seed=0).to(device)
    (actual,) = torch.autograd.grad(F.simam(x, statistics=statistics), x, grad_output)
    torch.testing.assert_close(actual, grad_output * torch.tensor(0.5, device=device).sigmoid())


def random_like(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def unit(x: Tensor, grad_output: Tensor, e_lambda: float) -> Tensor:
    """Return the size of the gradient's terms in each channel, to which rounding is relative.

    The terms may cancel. They are g s, and g x s (1 - s) times the derivative of d^2 q, which is
    inversely proportional to the standard deviation.
    """
    channels = x.double().flatten(2)
    deviations = channels - channels.mean(2, keepdim=True)
    variance = deviations.square().sum(2) / max(1, channels.shape[2] - 1)
    steepness = channels.abs().amax(2) / (variance + e_lambda).sqrt()
    return (grad_output.double().abs().max() * (1 + steepness)).reshape(
        *x.shape[:2], *[1] * (x.dim() - 2)
    )


def assert_close(actual: Tensor, expected: Tensor, unit: Tensor) -> None:
    dtype, info = actual.dtype, torch.finfo(actual.dtype)
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    final_rounding = rounding(dtype) * expected.abs() + info.smallest_normal * info.eps
    assert (error <= working_rounding(dtype) * unit + final_rounding).all()
