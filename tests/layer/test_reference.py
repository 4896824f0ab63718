"""The bounds of the gate, attained by explicit channels."""

import pytest
import torch

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
