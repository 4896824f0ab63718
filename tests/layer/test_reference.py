"""The bounds of the gate, attained by explicit channels, and maps of extreme values."""

import pytest
import torch

from simam import functional as F
from simam import reference
from simam.reference import gate_bounds
from tests.helpers import oracles

LOWER = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).item()


@pytest.mark.parametrize("positions", [2, 3, 9, 49, 12544])
def test_gate_bounds_are_attained(positions: int) -> None:
    # The channel with the largest gate: one neuron differs from the others, which are all equal.
    channel = [1e3] + [0.0] * (positions - 1)
    gates = oracles.gate(torch.tensor(oracles.shared(channel, 1e-12), dtype=torch.float64))
    lower, upper = gate_bounds(positions, "shared")
    assert lower == LOWER
    assert upper == pytest.approx(gates.max().item(), abs=1e-9)


def test_gate_bounds_of_one_position_and_of_leave_one_out() -> None:
    assert gate_bounds(1, "shared") == (LOWER, LOWER)
    assert gate_bounds(49, "leave_one_out") == (LOWER, 1)


# The squares of the smallest and of the largest of these maps are outside the range of float32.
@pytest.mark.parametrize("statistics", ["shared", "leave_one_out"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_reference_is_accurate_at_every_scale(scale: float, statistics: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad_output = torch.randn(2, 1, 3, 7, 7, generator=generator)
    x = scale * x
    e_lambda = 0.1 * scale**2
    wide = x.double().requires_grad_()
    expected = F.simam(wide, e_lambda, statistics=statistics)
    (gradient,) = torch.autograd.grad(expected, wide, grad_output.double())

    actual = reference.forward(x, e_lambda, statistics)
    assert ((actual - expected).abs() / scale).max() < 1e-6
    actual = reference.backward(grad_output, x, e_lambda, statistics)
    assert (actual - gradient).abs().max() < 1e-5


@pytest.mark.parametrize("statistics", ["shared", "leave_one_out"])
def test_reference_of_equal_neurons_whose_mean_is_inexact(statistics: str) -> None:
    # The error of the mean, about 1e5, makes sqrt(lambda) round to 0 beside it.
    x = torch.full((1, 1, 13, 17), 1e13 / 3)
    assert (x != x.mean()).all()
    torch.testing.assert_close(reference.forward(x, 1e-12, statistics), x * LOWER)
