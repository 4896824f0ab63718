"""The closed forms are what the paper defines: brute force, literal loops, properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simam import functional as F
from tests.helpers import oracles
from tests.helpers.oracles import assert_close, rounding, working_rounding
from tests.helpers.strategies import DTYPES, integer_maps, lambdas, maps, place

pytestmark = pytest.mark.usefixtures("implementation")

STATISTICS = ("shared", "leave_one_out")
statistics = st.sampled_from(STATISTICS)

# Expanded, an outlier would have company.
outliers = maps(kinds=("outlier",), layouts=("permuted", "sliced"), scales=(1e6,), min_positions=2)


@given(x=maps(dtypes=DTYPES, min_positions=2), e_lambda=lambdas)
def test_leave_one_out_is_the_minimum_of_the_energy(
    x: Tensor, e_lambda: float, device: torch.device
) -> None:
    def minima(channel: list[float]) -> list[float]:
        neurons = range(len(channel))
        return [oracles.brute_force(channel, index, e_lambda)[2] for index in neurons]

    actual = F.energy(place(x, device), e_lambda, statistics="leave_one_out")
    # Absolute, of energies from 0 to 2: where one neuron holds all of S, s_t^2 is the
    # difference of two numbers as large as S / M, so its rounding is relative to those.
    assert_close(actual, oracles.each_channel(minima, x), absolute=working_rounding(x.dtype))


@given(x=maps(min_positions=2), e_lambda=lambdas)
def test_minimiser_is_the_closed_form(x: Tensor, e_lambda: float) -> None:
    channel = x.double().flatten(2)[0, 0].tolist()
    centre = abs(math.fsum(channel)) / len(channel)
    eps = torch.finfo(torch.float64).eps
    for index in range(len(channel)):
        w, b, _ = oracles.brute_force(channel, index, e_lambda)
        exact_w, exact_b = oracles.minimiser(channel, index, e_lambda)
        # The solver's error is relative to the norm of w's column, and b carries that of w
        # times the origin.
        others = [*channel[:index], *channel[index + 1 :]]
        unit = math.sqrt(e_lambda + sum((y - channel[index]) ** 2 for y in others) / len(others))
        assert w == pytest.approx(float(exact_w), rel=0, abs=64 * eps / unit)
        assert b == pytest.approx(float(exact_b), rel=0, abs=64 * eps * (1 + centre / unit))


@given(x=maps(min_positions=2), e_lambda=lambdas)
@settings(max_examples=25)
def test_oracles_agree_without_rounding(x: Tensor, e_lambda: float) -> None:
    channel = x.double().flatten(2)[0, 0].tolist()
    energies = oracles.leave_one_out(channel, e_lambda)
    for index, energy in enumerate(energies):
        w, b = oracles.minimiser(channel, index, e_lambda)
        minimum = oracles.definition(w, b, channel, index, e_lambda)
        assert float(minimum) == energy
        # A quadratic that grows alike to both sides of a point has its minimum there.
        for w_step, b_step in ((1, 0), (0, 1)):
            up = oracles.definition(w + w_step, b + b_step, channel, index, e_lambda)
            down = oracles.definition(w - w_step, b - b_step, channel, index, e_lambda)
            assert up == down > minimum


@given(x=outliers)
def test_lone_outlier_has_no_energy(x: Tensor, device: torch.device) -> None:
    # What rounding leaves of s_t^2, of either sign, is far above this lambda.
    x = place(x, device)
    energy = F.energy(x, 1e-8, statistics="leave_one_out")
    gate = F.attention(x, 1e-8, statistics="leave_one_out")
    exact = oracles.each_channel(oracles.leave_one_out, x, 1e-8)
    assert energy.min() >= 0
    assert_close(energy, exact, absolute=working_rounding(x.dtype))
    assert_close(gate, oracles.gate(exact))


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas)
def test_shared_is_the_literal_loop(x: Tensor, e_lambda: float, device: torch.device) -> None:
    energies = oracles.each_channel(oracles.shared, x, e_lambda)
    assert_close(F.energy(place(x, device), e_lambda), energies)


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_layer_is_the_gated_neuron(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    expected = oracles.gate(oracles.each_channel(oracles.ENERGY[statistics], x, e_lambda))
    placed = place(x, device)
    assert_close(F.attention(placed, e_lambda, statistics=statistics), expected)
    assert_close(F.simam(placed, e_lambda, statistics=statistics), x.double() * expected)


@given(x=maps(), e_lambda=lambdas, statistics=statistics, data=st.data())
def test_permuting_positions_commutes(
    x: Tensor, e_lambda: float, statistics: str, data: st.DataObject, device: torch.device
) -> None:
    x = place(x, device).flatten(2)
    order = data.draw(st.permutations(range(x.shape[2])))
    output = F.simam(x, e_lambda, statistics=statistics)
    # The order of a sum changes its rounding.
    assert_close(F.simam(x[..., order], e_lambda, statistics=statistics), output[..., order])


@given(x=maps(), e_lambda=lambdas, statistics=statistics)
def test_channels_and_samples_are_independent(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = place(x, device)
    output = F.simam(x, e_lambda, statistics=statistics)
    alone = F.simam(x[-1:, -1:], e_lambda, statistics=statistics)
    assert_close(alone, output[-1:, -1:])


@given(
    x=integer_maps(),
    constant=st.integers(-(2**16), 2**16),
    e_lambda=lambdas,
    statistics=statistics,
)
def test_adding_a_constant_leaves_the_gate(
    x: Tensor, constant: int, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = place(x, device)
    gate = F.attention(x, e_lambda, statistics=statistics)
    assert_close(F.attention(x + constant, e_lambda, statistics=statistics), gate)


@given(x=integer_maps(), power=st.integers(-10, 10), e_lambda=lambdas, statistics=statistics)
def test_scaling_with_lambda_leaves_the_gate(
    x: Tensor, power: int, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = place(x, device)
    scaled = F.attention(x * 2.0**power, e_lambda * 4.0**power, statistics=statistics)
    # A power of two moves exponents alone, so not one bit may differ.
    assert torch.equal(scaled, F.attention(x, e_lambda, statistics=statistics))


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_sign_leaves_the_gate(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = place(x, device)
    gate = F.attention(x, e_lambda, statistics=statistics)
    # Where x and -x differ in their strides, so does the order of their sums.
    assert_close(F.attention(-x, e_lambda, statistics=statistics), gate)


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_bounds_hold(x: Tensor, e_lambda: float, statistics: str, device: torch.device) -> None:
    x = place(x, device)
    slack = rounding(x.dtype)
    positions = math.prod(x.shape[2:])
    gate = F.attention(x, e_lambda, statistics=statistics).double()
    energy = F.energy(x, e_lambda, statistics=statistics).double()
    assert gate.min() >= sigmoid(0.5) - slack
    assert gate.max() <= 1
    assert energy.min() >= 0
    assert energy.max() <= 2
    if statistics == "shared":
        assert gate.max() <= sigmoid((positions - 1) ** 2 / (4 * positions) + 0.5) + slack
        mean = (1 / energy).flatten(2).mean(2)
        assert mean.max() <= (0.5 + (positions - 1) / (4 * positions)) * (1 + slack)


@given(x=outliers)
def test_outlier_attains_the_upper_bound(x: Tensor, device: torch.device) -> None:
    positions = math.prod(x.shape[2:])
    gate = F.attention(place(x, device), 1e-8).flatten(2).amax(2)[varied(x)]
    bound = sigmoid((positions - 1) ** 2 / (4 * positions) + 0.5)
    assert_close(gate, torch.full_like(gate, bound))


@given(x=maps(kinds=("normal", "signs", "outlier"), scales=(1e6,), min_positions=2))
def test_mean_attains_its_bound_as_lambda_vanishes(x: Tensor, device: torch.device) -> None:
    positions = math.prod(x.shape[2:])
    inverse = 1 / F.energy(place(x, device), 1e-8).double()
    mean = inverse.flatten(2).mean(2).to(x.dtype)[varied(x)]
    assert_close(mean, torch.full_like(mean, 0.5 + (positions - 1) / (4 * positions)))


def varied(x: Tensor) -> Tensor:
    """The channels beside whose variance a lambda of 1e-8 is lost in rounding."""
    return x.double().flatten(2).std(2) > 1e4


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
