"""SimAM with a mask: statistics over the counted positions of each sample."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simam import SimAM
from simam.functional import attention, energy, simam

STATISTICS = ["shared", "leave_one_out"]


def gate_of(t: float, counted: list[float], is_counted: bool, lam: float, statistics: str) -> float:
    """The gate of one position by the definition: a loop in Python's floats."""
    others = list(counted)
    if statistics == "leave_one_out" and is_counted:
        others.remove(t)
    if not counted:
        return 1 / (1 + math.exp(-0.5))
    if not others:
        return 1 / (1 + math.exp(-0.5))
    mean = math.fsum(others) / len(others)
    square = math.fsum((o - mean) ** 2 for o in others)
    divisor = max(len(others) - 1, 1) if statistics == "shared" else len(others)
    u = (t - mean) ** 2 / (4 * (square / divisor + lam))
    return 1 / (1 + math.exp(-min(u, 500) - 0.5))


def by_loop(x: Tensor, mask: Tensor, lam: float, statistics: str) -> Tensor:
    gates = torch.empty_like(x)
    for n in range(x.shape[0]):
        flags = mask.expand(x.shape[0], 1, *x.shape[2:])[n, 0].flatten().tolist()
        for c in range(x.shape[1]):
            values = x[n, c].flatten().tolist()
            counted = [v for v, flag in zip(values, flags, strict=True) if flag]
            gates[n, c] = torch.tensor(
                [
                    gate_of(v, counted, flag, lam, statistics)
                    for v, flag in zip(values, flags, strict=True)
                ],
                dtype=x.dtype,
            ).view_as(gates[n, c])
    return gates


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    return torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.6


@pytest.mark.parametrize("statistics", STATISTICS)
def test_simam_with_mask_matches_the_definition(x: Tensor, mask: Tensor, statistics: str) -> None:
    gates = by_loop(x, mask, 0.1, statistics)
    options = {"statistics": statistics, "mask": mask}
    torch.testing.assert_close(attention(x, 0.1, **options), gates, rtol=1e-12, atol=0)
    torch.testing.assert_close(simam(x, 0.1, **options), x * gates, rtol=1e-12, atol=0)
    expected = 1 / (gates / (1 - gates)).log()
    torch.testing.assert_close(energy(x, 0.1, **options), expected, rtol=1e-9, atol=0)
    layer = SimAM(e_lambda=0.1, statistics=statistics)
    assert torch.equal(layer(x, mask), simam(x, 0.1, **options))
    assert torch.equal(layer(x, mask=mask), layer(x, mask))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_simam_with_everything_counted_is_the_plain_call(
    x: Tensor, statistics: str, dtype: torch.dtype
) -> None:
    x = x.to(dtype)
    full = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    output = simam(x, 0.1, statistics=statistics, mask=full)
    assert output.dtype == dtype
    torch.testing.assert_close(output, simam(x, 0.1, statistics=statistics))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("padding", [0.0, 1e4, 1e308, math.nan, math.inf, -math.inf])
@settings(max_examples=15)
@given(data=st.data())
def test_appended_positions_change_nothing_among_the_counted(
    statistics: str, padding: float, data: st.DataObject
) -> None:
    length, added = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    valid = torch.randn(2, 3, 4, length, dtype=torch.float64, generator=generator)
    padded = torch.cat([valid, torch.full_like(valid[..., :1], padding).expand(2, 3, 4, added)], -1)
    mask = torch.arange(length + added) < length
    results = []
    for maps, options in ((valid, {}), (padded, {"mask": mask})):
        leaf = maps.clone().requires_grad_()
        output = simam(leaf, 0.1, statistics=statistics, **options)[..., :length]
        output.square().sum().backward()
        results.append((output, leaf.grad[..., :length]))
        assert leaf.grad[..., length:].abs().sum() == 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_simam_with_mask_has_the_right_gradient(x: Tensor, mask: Tensor, statistics: str) -> None:
    mask = mask[..., :3, :4].clone()
    mask[1], mask[2] = False, False
    mask[2, 0, 0, 0] = True  # a sample with none, and one with a single counted position
    leaf = x[:, :1, :3, :4].clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return simam(x, 0.1, statistics=statistics, mask=mask)

    assert torch.autograd.gradcheck(run, leaf)
    assert torch.autograd.gradgradcheck(run, leaf)


def test_simam_with_mask_matches_a_gradient_derived_by_hand(x: Tensor, mask: Tensor) -> None:
    """The shared form: with t = g x s (1 - s), over counted positions for the statistics.

    The moments depend on counted positions alone, but every position's gate depends on them. So
    A = sum t d^2 and B = sum t d run over all positions, and their terms reach the counted ones.
    """
    lam = 0.1
    leaf, g = x.clone().requires_grad_(), torch.randn_like(x)
    simam(leaf, lam, mask=mask).backward(g)
    m = mask.expand_as(x).double()
    count = m.sum((2, 3), keepdim=True)
    d = x - (x * m).sum((2, 3), keepdim=True) / count
    q = 1 / (4 * ((d * d * m).sum((2, 3), keepdim=True) / (count - 1) + lam))
    s = torch.sigmoid(d * d * q + 0.5)
    t = g * x * s * (1 - s)
    a, b = (t * d * d).sum((2, 3), keepdim=True), (t * d).sum((2, 3), keepdim=True)
    expected = g * s + 2 * q * t * d - m * (2 * q * b / count + 8 * q * q * a * d / (count - 1))
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_simam_with_one_or_no_counted_position(x: Tensor, statistics: str) -> None:
    mask = torch.zeros(3, 1, 5, 6, dtype=torch.bool)
    mask[0, 0, 2, 3] = True
    x[1, 0, 0, 0] = math.nan
    output = simam(x, statistics=statistics, mask=mask)
    half = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(output[0, :, 2, 3], x[0, :, 2, 3] * half)
    torch.testing.assert_close(output[1:], x[1:] * half, equal_nan=True)
    assert output.isfinite().sum() == x.numel() - 1


def test_nan_among_the_counted_stays_in_its_channel(x: Tensor) -> None:
    x[0, 1, 2, 3] = math.nan
    output = simam(x, mask=torch.ones(5, 6, dtype=torch.bool))
    assert output[0, 1].isnan().all()
    assert output.isnan().sum() == output[0, 1].numel()


@pytest.mark.parametrize("shape", [(3, 1, 5, 6), (1, 1, 5, 6), (5, 6), (6,), (3, 1, 1, 6), (1,)])
def test_mask_broadcasts(x: Tensor, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    whole = mask.expand(3, 1, 5, 6)
    assert torch.equal(simam(x, mask=mask), simam(x, mask=whole))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 1, 5, 6), TypeError, "mask must be a bool tensor, got torch.float32"),
        ([True], TypeError, "mask must be a bool tensor, got list"),
        (
            torch.ones(3, 4, 5, 6, dtype=torch.bool),
            ValueError,
            "mask must broadcast to (N, 1, *spatial), here [3, 1, 5, 6], got [3, 4, 5, 6]",
        ),
        (
            torch.ones(3, 6, dtype=torch.bool),
            ValueError,
            "mask must broadcast to (N, 1, *spatial), here [3, 1, 5, 6], got [3, 6]",
        ),
        (torch.ones(1, 3, 1, 5, 6, dtype=torch.bool), ValueError, "mask must broadcast to"),
    ],
)
def test_simam_refuses_a_wrong_mask(
    x: Tensor, mask: object, error: type[Exception], message: str
) -> None:
    for function in (simam, attention, energy):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            function(x, mask=mask)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        SimAM()(x, mask)


def test_SimAM_with_mask_can_be_scripted_compiled_and_exported(x: Tensor, mask: Tensor) -> None:
    layer = SimAM(e_lambda=0.1)
    expected = layer(x, mask)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x, mask), expected)
    torch.testing.assert_close(scripted(x), layer(x))
    exported = torch.export.export(layer, (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), expected)


def test_simam_with_mask_on_sequences() -> None:
    layer = nn.Sequential(nn.Conv1d(2, 3, 1), SimAM())
    x = torch.randn(2, 2, 7)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None]
    output = layer[1](layer[0](x), mask)
    torch.testing.assert_close(output[1:, :, :4], layer(x[1:, :, :4]))
    torch.testing.assert_close(output[:1], layer(x[:1]))
