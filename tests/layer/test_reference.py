"""The bounds of the gate, attained by explicit channels."""

import pytest
import torch

from simam import reference
from tests.helpers import oracles


@pytest.mark.parametrize("positions", [2, 3, 9, 49, 12544])
def test_gate_bounds_are_attained(positions: int) -> None:
    # The channel that comes closest to the bound: all neurons are equal but one.
    channel = [1e3] + [0.0] * (positions - 1)
    gates = oracles.gate(torch.tensor(oracles.shared(channel, 1e-12), dtype=torch.float64))
    _, upper = reference.gate_bounds(positions, "shared")
    assert upper == pytest.approx(gates.max().item(), abs=1e-9)


@pytest.mark.parametrize("statistics", ["shared", "leave_one_out"])
def test_gate_bounds_lower_is_the_gate_of_a_constant_channel(statistics: str) -> None:
    gate = oracles.gate(torch.tensor(2.0, dtype=torch.float64)).item()
    assert reference.gate_bounds(49, statistics)[0] == pytest.approx(gate, abs=1e-15)


def test_gate_bounds_meet_at_one_position_and_leave_one_out_has_no_upper_bound() -> None:
    gate = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).item()
    assert reference.gate_bounds(1, "shared") == (gate, gate)
    assert reference.gate_bounds(49, "leave_one_out")[1] == 1
