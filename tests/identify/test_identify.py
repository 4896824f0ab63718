"""`simam.identify` on copies of SimAM that are written by hand: `tests.helpers.copies`."""

import copy
import inspect
import math
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simam import Identification, SimAM, identify
from tests.helpers import copies, oracles
from tests.helpers.copies import COPIES
from tests.helpers.strategies import lambdas


@pytest.mark.parametrize("name", COPIES)
def test_identify_names_what_a_copy_computes(name: str) -> None:
    expected = COPIES[name]
    found = identify(expected.make())
    assert found.formula == expected.formula
    assert found.e_lambda == (expected.e_lambda and pytest.approx(expected.e_lambda, rel=1e-6))
    for words in expected.difference:
        assert words in found.difference
    if expected.formula == "other":
        assert found.max_error >= 0
        assert "nearest form" in found.difference or math.isinf(found.max_error)
    else:
        assert found.max_error < (1e-5 if "float32" in found.difference else 1e-12)


@pytest.mark.parametrize("statistics", ["shared", "leave_one_out"])
def test_identify_finds_no_difference_in_simam(statistics: str) -> None:
    found = identify(SimAM(e_lambda=0.03, statistics=statistics))
    assert found == Identification(statistics, 0.03, found.max_error, "")
    assert found.max_error < 1e-14


@settings(max_examples=6)
@given(e_lambda=lambdas, leave_one_out=st.booleans())
def test_identify_fits_any_lambda_of_the_closed_forms(e_lambda: float, leave_one_out: bool) -> None:
    kind = copies.LeaveOneOut if leave_one_out else copies.AuthorsFlat
    found = identify(kind(e_lambda))
    assert found.formula == ("leave_one_out" if leave_one_out else "shared")
    assert found.e_lambda == pytest.approx(e_lambda, rel=1e-9)


OTHERS = {
    copies.over_m: "by M instead of M - 1",
    copies.lambda_once: "lambda once instead of twice",
    copies.pooled: "sums the numerator",
    copies.no_sigmoid: "has no sigmoid",
    copies.half_in_denominator: "1/2 inside the denominator",
    copies.inverted: "order is inverted",
    copies.signed: "signed deviation",
    copies.over_rows: "last axis only",
    copies.gate: "returns the gate",
    copies.residual: "x + x * gate",
}


@settings(max_examples=8)
@given(e_lambda=lambdas, function=st.sampled_from(list(OTHERS)))
def test_identify_names_a_deviation_for_any_lambda(e_lambda: float, function: Any) -> None:
    found = identify(copies.Formula(function, e_lambda))
    assert found.formula == "other"
    assert found.e_lambda == pytest.approx(e_lambda, rel=1e-5)
    assert OTHERS[function] in found.difference


@settings(max_examples=5)
@given(height=st.integers(3, 9), width=st.integers(3, 9), over=st.sampled_from([0, 1]))
def test_identify_takes_the_only_size_of_a_module(height: int, width: int, over: int) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = (height, width)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == self.size
            return x * torch.sigmoid(copies.inverse_energy(x, 0.1, minus=over))

    found = identify(Sized())
    assert found.formula == ("shared" if over else "other")
    assert f"takes only maps of {height}x{width}" in found.difference


def test_identify_names_several_deviations_with_and() -> None:
    found = identify(copies.Formula(copies.gate_over_m, 0.1))
    assert found.difference.startswith(
        "returns the gate instead of x * gate, divides the sum of squares by M instead of M - 1, "
        "has no 1/2 and"
    )


def test_identify_agrees_with_the_oracles() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("shared", "leave_one_out"):
        gates = oracles.gate(oracles.each_channel(oracles.ENERGY[name], x, 0.1))
        kind = copies.LeaveOneOut if name == "leave_one_out" else copies.AuthorsFlat
        torch.testing.assert_close(kind(0.1)(x), x * gates)
        assert identify(kind(0.1)).formula == name


class Strict(nn.Module):
    """A module whose every trace of a call is seen: state, mode, hooks, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[Any] = []
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float32))
        self.dropout = nn.Dropout(0.5)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.count += 1
        random.random()
        self.last = self.dropout(x) * self.weight.sum() * torch.rand(())
        return self.last


def test_identify_leaves_the_module_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    module = Strict().train()
    module.dropout.eval()
    hooked: list[str] = []
    module.register_forward_hook(lambda *_: hooked.append("forward"))
    module.register_forward_pre_hook(lambda *_: hooked.append("pre"))
    before = copy.deepcopy(module.state_dict())
    pointers = [p.data_ptr() for p in (*module.parameters(), *module.buffers())]
    generators = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    identify(module)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), torch.is_grad_enabled()) == generators[1:]
    assert (module.calls, module.seen, module.last, hooked) == (0, [], None, [])
    assert (module.training, module.dropout.training) == (True, False)
    assert pointers == [p.data_ptr() for p in (*module.parameters(), *module.buffers())]
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad
    assert module.weight.grad is None
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert capsys.readouterr() == ("", "")


def test_identify_shows_nothing_that_a_module_prints(capsys: pytest.CaptureFixture[str]) -> None:
    identify(copies.Printing())
    assert capsys.readouterr() == ("", "")


def test_identify_takes_a_module_that_keeps_a_result_with_history() -> None:
    class Keeping(copies.Authors):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = {"outputs": [super().forward(x)]}
            return self.kept["outputs"][0]

    module = Keeping()
    module(torch.randn(1, 2, 3, 3, requires_grad=True))
    kept = module.kept["outputs"][0]
    assert identify(module).formula == "shared"
    assert module.kept["outputs"][0] is kept


def test_identify_works_in_inference_mode() -> None:
    with torch.inference_mode():
        assert identify(copies.Authors()).formula == "shared"


def test_identify_prints_a_table() -> None:
    lines = str(identify(copies.Formula(copies.gate_over_m, 0.1))).splitlines()
    assert lines[0] == "formula     other"
    assert lines[1] == "e_lambda    0.1"
    assert lines[2].startswith("max error   0.9")
    assert lines[3].startswith("difference  returns the gate instead of x * gate")
    assert all(line.startswith(" " * 12) for line in lines[4:])
    assert max(map(len, lines)) <= 100
    text = str(Identification("other", None, math.inf, ""))
    assert text.splitlines() == [
        "formula     other",
        "e_lambda    none",
        "max error   inf",
        "difference  none",
    ]


def test_identify_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"^expected an nn.Module, got function$"):
        identify(copies.gate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^expected an nn.Module, got type$"):
        identify(copies.Authors)  # type: ignore[arg-type]


def test_identify_refuses_a_module_that_takes_no_map() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)^this Bilinear .* shape 2x8x5x7 .*TypeError.*input2"
    ):
        identify(nn.Bilinear(2, 2, 2))


def test_identify_refuses_a_module_that_cannot_be_copied() -> None:
    module = copies.Authors()
    module.frame = inspect.currentframe()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^this Authors cannot be copied: TypeError"):
        identify(module)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.ReLU(), "computes every output from one input value alone"),
        (nn.AvgPool2d(2), "returns a tensor of shape 2x8x2x3 for an input of shape 2x8x5x7"),
        (nn.Conv2d(8, 8, 3, padding=1), "has parameters (weight, bias) that change its output"),
        (nn.InstanceNorm2d(8), "square root of the variance plus lambda"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_identify_takes_a_layer_that_is_no_simam(module: nn.Module, words: str) -> None:
    found = identify(module)
    assert found.formula == "other"
    assert words in found.difference


def test_identify_takes_less_than_two_seconds() -> None:
    start = time.process_time()
    identify(COPIES["over the sample"].make())
    assert time.process_time() - start < 2
