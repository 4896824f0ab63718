"""The closed forms against the paper's definition: brute force, plain loops, properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simam import functional as F
from tests.helpers import oracles
from tests.helpers.oracles import assert_close, rounding, working_rounding
from tests.helpers.strategies import DTYPES, integer_maps, lambdas, maps, to_device

each_implementation = pytest.mark.usefixtures("implementation")

STATISTICS = ("shared", "leave_one_out")
statistics = st.sampled_from(STATISTICS)

# Not expanded, which would repeat the outlier.
outliers = maps(kinds=("outlier",), layouts=("permuted", "sliced"), scales=(1e6,), min_positions=2)


@given(x=maps(dtypes=DTYPES, min_positions=2), e_lambda=lambdas)
def test_energy_leave_one_out_is_the_minimum(
    x: Tensor, e_lambda: float, device: torch.device
) -> None:
    def minima(channel: list[float]) -> list[float]:
        neurons = range(len(channel))
        return [oracles.brute_force(channel, index, e_lambda)[2] for index in neurons]

    actual = F.energy(to_device(x, device), e_lambda, statistics="leave_one_out")
    # The tolerance is absolute, for energies from 0 to 2: where one neuron holds all of S, s_t^2
    # is the difference of two numbers as large as S / M, and rounding is relative to them.
    assert_close(actual, oracles.each_channel(minima, x), absolute=working_rounding(x.dtype))


@given(x=maps(min_positions=2), e_lambda=lambdas)
def test_oracles_brute_force_matches_the_closed_form(x: Tensor, e_lambda: float) -> None:
    channel = x.double().flatten(2)[0, 0].tolist()
    origin = abs(math.fsum(channel)) / len(channel)
    eps = torch.finfo(torch.float64).eps
    for index in range(len(channel)):
        w, b, _ = oracles.brute_force(channel, index, e_lambda)
        exact_w, exact_b = oracles.minimiser(channel, index, e_lambda)
        # The solver's error is relative to the norm of w's column. The error of b includes the
        # error of w times the origin.
        others = [*channel[:index], *channel[index + 1 :]]
        unit = math.sqrt(e_lambda + sum((y - channel[index]) ** 2 for y in others) / len(others))
        assert w == pytest.approx(float(exact_w), rel=0, abs=64 * eps / unit)
        assert b == pytest.approx(float(exact_b), rel=0, abs=64 * eps * (1 + origin / unit))


@given(x=maps(min_positions=2), e_lambda=lambdas)
@settings(max_examples=25)
def test_oracles_minimiser_is_exact(x: Tensor, e_lambda: float) -> None:
    channel = x.double().flatten(2)[0, 0].tolist()
    energies = oracles.leave_one_out(channel, e_lambda)
    for index, energy in enumerate(energies):
        w, b = oracles.minimiser(channel, index, e_lambda)
        minimum = oracles.energy_function(w, b, channel, index, e_lambda)
        assert float(minimum) == energy
        # A quadratic that grows equally to both sides of a point has its minimum there.
        for w_step, b_step in ((1, 0), (0, 1)):
            up = oracles.energy_function(w + w_step, b + b_step, channel, index, e_lambda)
            down = oracles.energy_function(w - w_step, b - b_step, channel, index, e_lambda)
            assert up == down > minimum


@given(x=outliers)
def test_energy_and_attention_of_a_lone_outlier(x: Tensor, device: torch.device) -> None:
    # s_t^2 is 0, but its rounding error, of either sign, is far larger than this lambda.
    x = to_device(x, device)
    energy = F.energy(x, 1e-8, statistics="leave_one_out")
    gate = F.attention(x, 1e-8, statistics="leave_one_out")
    exact = oracles.each_channel(oracles.leave_one_out, x, 1e-8)
    assert energy.min() >= 0
    assert_close(energy, exact, absolute=working_rounding(x.dtype))
    assert_close(gate, oracles.gate(exact))


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas)
def test_energy_shared_matches_a_plain_loop(
    x: Tensor, e_lambda: float, device: torch.device
) -> None:
    energies = oracles.each_channel(oracles.shared, x, e_lambda)
    assert_close(F.energy(to_device(x, device), e_lambda), energies)


@each_implementation
@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_simam_is_the_neuron_times_its_gate(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    expected = oracles.gate(oracles.each_channel(oracles.ENERGY[statistics], x, e_lambda))
    x_device = to_device(x, device)
    assert_close(F.attention(x_device, e_lambda, statistics=statistics), expected)
    assert_close(F.simam(x_device, e_lambda, statistics=statistics), x.double() * expected)


@each_implementation
@given(x=maps(), e_lambda=lambdas, statistics=statistics, data=st.data())
def test_simam_commutes_with_permuting_positions(
    x: Tensor, e_lambda: float, statistics: str, data: st.DataObject, device: torch.device
) -> None:
    x = to_device(x, device).flatten(2)
    order = data.draw(st.permutations(range(x.shape[2])))
    output = F.simam(x, e_lambda, statistics=statistics)
    # The order of a sum changes its rounding error.
    assert_close(F.simam(x[..., order], e_lambda, statistics=statistics), output[..., order])


@each_implementation
@given(x=maps(), e_lambda=lambdas, statistics=statistics)
def test_simam_treats_channels_and_samples_independently(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = to_device(x, device)
    output = F.simam(x, e_lambda, statistics=statistics)
    alone = F.simam(x[-1:, -1:], e_lambda, statistics=statistics)
    assert_close(alone, output[-1:, -1:])


@given(
    x=integer_maps(),
    constant=st.integers(-(2**16), 2**16),
    e_lambda=lambdas,
    statistics=statistics,
)
def test_attention_does_not_change_with_an_added_constant(
    x: Tensor, constant: int, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = to_device(x, device)
    gate = F.attention(x, e_lambda, statistics=statistics)
    assert_close(F.attention(x + constant, e_lambda, statistics=statistics), gate)


@given(x=integer_maps(), power=st.integers(-10, 10), e_lambda=lambdas, statistics=statistics)
def test_attention_does_not_change_with_the_scale_of_x_and_lambda(
    x: Tensor, power: int, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = to_device(x, device)
    scaled = F.attention(x * 2.0**power, e_lambda * 4.0**power, statistics=statistics)
    # A power of two changes only exponents, so the results must be equal bit for bit.
    assert torch.equal(scaled, F.attention(x, e_lambda, statistics=statistics))


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_attention_does_not_change_with_the_sign(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = to_device(x, device)
    gate = F.attention(x, e_lambda, statistics=statistics)
    # Where the strides of x and -x differ, their sums are taken in different orders.
    assert_close(F.attention(-x, e_lambda, statistics=statistics), gate)


@given(x=maps(dtypes=DTYPES), e_lambda=lambdas, statistics=statistics)
def test_attention_and_energy_are_within_their_bounds(
    x: Tensor, e_lambda: float, statistics: str, device: torch.device
) -> None:
    x = to_device(x, device)
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
def test_attention_of_an_outlier_attains_the_upper_bound(x: Tensor, device: torch.device) -> None:
    positions = math.prod(x.shape[2:])
    gate = F.attention(to_device(x, device), 1e-8).flatten(2).amax(2)[varied(x)]
    bound = sigmoid((positions - 1) ** 2 / (4 * positions) + 0.5)
    assert_close(gate, torch.full_like(gate, bound))


@given(x=maps(kinds=("normal", "signs", "outlier"), scales=(1e6,), min_positions=2))
def test_energy_mean_attains_its_bound_as_lambda_vanishes(x: Tensor, device: torch.device) -> None:
    positions = math.prod(x.shape[2:])
    inverse = 1 / F.energy(to_device(x, device), 1e-8).double()
    mean = inverse.flatten(2).mean(2).to(x.dtype)[varied(x)]
    assert_close(mean, torch.full_like(mean, 0.5 + (positions - 1) / (4 * positions)))


def varied(x: Tensor) -> Tensor:
    """Return which channels have a variance beside which a lambda of 1e-8 rounds away."""
    return x.double().flatten(2).std(2) > 1e4


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
