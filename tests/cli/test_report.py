"""What a report measures, and how, on small networks."""

import importlib
import re
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simam.cli import report as report_module
from simam.cli.models import Subject
from simam.cli.report import MeasuredInsertion, Report, measure
from simam.messages import UserError
from tests.helpers.tiny_blocks import basic, block


def test_report_documents_every_key() -> None:
    for kind in (Report, MeasuredInsertion):
        for key in kind.__dataclass_fields__:
            assert re.search(rf"^ +(.*, )?{key} \(", kind.__doc__ or "", re.MULTILINE), key


def test_report_counts_calls_and_leaves_the_model_unchanged() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.used(x))

    subject = Subject("shared", "none", "0", Shared().eval(), (3, 8, 8))
    plain = repr(subject.model)
    found = measure(subject, (1, 3, 8, 8), where=["*used"], repeats=1)
    assert repr(subject.model) == plain
    assert not any(module._forward_hooks for module in subject.model.modules())
    used, unused = found.insertions
    assert (used.shape, used.calls, used.elements) == ([1, 3, 6, 6], 2, 3 * (6 * 6 + 4 * 4))
    assert (unused.shape, unused.calls, unused.elements) == (None, 0, 0)


@block
def loops(self, x):
    return x + self.branch(torch.cat([part + 1 for part in x.chunk(2)]))


@pytest.mark.parametrize("net", [loops(), nn.Sequential(basic(), loops())], ids=["one", "two"])
def test_report_takes_its_inputs_as_the_example_where_the_code_is_not_enough(
    net: nn.Module,
) -> None:
    hosts = [path for path, _ in net.named_modules() if path.endswith("conv2")]
    found = measure(Subject("loops", "none", "0", net.eval(), (8, 8, 8)), (2, 8, 8, 8), repeats=1)
    assert [insertion.path for insertion in found.insertions] == hosts
    assert found.unanalysed == []


def test_report_keeps_the_error_of_the_plan_without_an_example() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    with pytest.raises(UserError, match=r"^found no place for SimAM in this Sequential"):
        measure(Subject("plain", "none", "0", net, (8, 8, 8)), (1, 3, 8, 8))


@pytest.mark.parametrize("running_statistics", [True, False])
def test_report_counts_batch_norms_that_torch_decomposes(running_statistics: bool) -> None:
    importlib.import_module("torch._decomp.decompositions")
    norm = nn.BatchNorm2d(4, track_running_stats=running_statistics)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    subject = Subject("norm", "none", "0", model, (3, 8, 8))
    found = measure(subject, (1, 3, 8, 8), where=["0"], repeats=1)
    expected = (3 + 2) * 4 * 8 * 8
    assert found.multiply_adds == {"before": expected, "after": expected}


def test_report_passes_options_to_the_layer() -> None:
    layers = set()

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            layers.add(repr(getattr(self.conv, "simam", None)))
            return self.conv(x)

    subject = Subject("recorder", "none", "0", Recorder().eval(), (3, 8, 8))
    options = {"e_lambda": 0.5, "statistics": "leave_one_out"}
    found = measure(subject, (1, 3, 8, 8), where=["conv"], repeats=1, **options)
    assert layers == {"None", "SimAM(e_lambda=0.5, statistics='leave_one_out')"}
    assert {"e_lambda": found.e_lambda, "statistics": found.statistics} == options


class Clock:
    """A clock that only the forward passes of the tested models advance."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: list[str] = []

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Clock, Report]]:
    """Measures a network whose forward passes take the given seconds, before and after SimAM."""

    def measure_timed(
        before: Iterable[float], after: Iterable[float], repeats: int | None, **options: Any
    ) -> Any:
        clock = Clock()
        seconds = {"before": iter(before), "after": iter(after)}

        class Timed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3)

            def forward(self, x: Tensor) -> Tensor:
                when = "after" if hasattr(self.conv, "simam") else "before"
                clock.passes.append(when)
                clock.seconds += next(seconds[when])
                return self.conv(x)

        monkeypatch.setattr(report_module, "time", clock)
        subject = Subject("timed", "none", "0", Timed().eval(), (3, 8, 8))
        return clock, measure(subject, (1, 3, 8, 8), where=["conv"], repeats=repeats, **options)

    return measure_timed


def test_report_interleaves_passes_after_a_warm_up(
    timed: Callable[..., tuple[Clock, Report]],
) -> None:
    # Of each model, the first pass counts operations and the second warms up: neither is timed.
    clock, found = timed([64, 64, 1, 2, 4], [64, 64, 2, 6, 16], 3)
    pair = ["before", "after"]
    assert clock.passes == [*pair, *pair, *pair, *reversed(pair), *pair]
    assert found.repeats == 3
    assert found.forward_ms == {
        "before": 2000.0,
        "after": 6000.0,
        "before_quartiles": [1500.0, 3000.0],
        "after_quartiles": [4000.0, 11000.0],
    }
    assert found.ratio == 3.0  # the median of 2, 3 and 4
    assert found.ratio_quartiles == [2.5, 3.5]


def test_report_accepts_one_pair_of_passes(timed: Callable[..., tuple[Clock, Report]]) -> None:
    _, found = timed([64, 64, 1], [64, 64, 3], 1)
    assert found.ratio == 3.0
    assert found.ratio_quartiles == [3.0, 3.0]


@pytest.mark.parametrize(("seconds", "pairs"), [(1e-3, 100), (0.25, 16), (60.0, 3)])
def test_report_times_as_many_passes_as_fit(
    seconds: float, pairs: int, timed: Callable[..., tuple[Clock, Report]]
) -> None:
    clock, found = timed(repeat(seconds), repeat(seconds), None)
    assert found.repeats == pairs
    assert len(clock.passes) == 4 + 2 * pairs


def test_report_shows_its_progress(timed: Callable[..., tuple[Clock, Report]]) -> None:
    stages: list[tuple[str, int, int]] = []
    timed(repeat(0.25), repeat(0.75), 2, progress=lambda *stage: stages.append(stage))
    assert stages == [
        ("planning", 0, 1),
        ("counting", 0, 2),
        ("counting", 1, 2),
        ("warming up", 0, 1),
        ("timing", 0, 2),
        ("timing", 1, 2),
    ]
