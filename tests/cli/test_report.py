"""What a report measures, and how: on networks of the tests' own."""

import importlib
import re
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import pytest
from torch import Tensor, nn

from simam.cli import report as measuring
from simam.cli.models import Subject


def test_keys_are_documented() -> None:
    for kind in (measuring.Report, measuring.Place):
        for key in kind.__dataclass_fields__:
            assert re.search(rf"^ +(.*, )?{key} \(", kind.__doc__ or "", re.MULTILINE), key


def test_calls_are_counted_and_the_model_is_left_as_it_was() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.used(x))

    subject = Subject("shared", "none", "0", Shared().eval(), (3, 8, 8))
    plain = repr(subject.model)
    found = measuring.measure(subject, (1, 3, 8, 8), where=["*used"], repeats=1)
    assert repr(subject.model) == plain
    assert not any(module._forward_hooks for module in subject.model.modules())
    used, unused = found.insertions
    assert (used.shape, used.calls, used.elements) == ([1, 3, 6, 6], 2, 3 * (6 * 6 + 4 * 4))
    assert (unused.shape, unused.calls, unused.elements) == (None, 0, 0)


@pytest.mark.parametrize("running_statistics", [True, False])
def test_report_counts_batch_norms_that_torch_decomposes(running_statistics: bool) -> None:
    importlib.import_module("torch._decomp.decompositions")
    norm = nn.BatchNorm2d(4, track_running_stats=running_statistics)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    subject = Subject("norm", "none", "0", model, (3, 8, 8))
    found = measuring.measure(subject, (1, 3, 8, 8), where=["0"], repeats=1)
    expected = (3 + 2) * 4 * 8 * 8
    assert found.multiply_adds == {"before": expected, "after": expected}


def test_options_reach_the_layer() -> None:
    layers = set()

    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            layers.add(repr(getattr(self.conv, "simam", None)))
            return self.conv(x)

    subject = Subject("shows", "none", "0", Shows().eval(), (3, 8, 8))
    options = {"e_lambda": 0.5, "statistics": "leave_one_out"}
    found = measuring.measure(subject, (1, 3, 8, 8), where=["conv"], repeats=1, **options)
    assert layers == {"None", "SimAM(e_lambda=0.5, statistics='leave_one_out')"}
    assert {"e_lambda": found.e_lambda, "statistics": found.statistics} == options


class Clock:
    """Stands still, but for the passes of the models under test."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: list[str] = []

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Clock, measuring.Report]]:
    """Measures a network whose passes take the seconds given, before and after."""

    def measure(
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

        monkeypatch.setattr(measuring, "time", clock)
        subject = Subject("timed", "none", "0", Timed().eval(), (3, 8, 8))
        return clock, measuring.measure(
            subject, (1, 3, 8, 8), where=["conv"], repeats=repeats, **options
        )

    return measure


def test_passes_are_interleaved_and_warmed_up(
    timed: Callable[..., tuple[Clock, measuring.Report]],
) -> None:
    # The first pass of each is counted, the second warms up; neither may enter the times.
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
    assert found.ratio == 3.0  # of 2, 3 and 4
    assert found.ratio_quartiles == [2.5, 3.5]


def test_one_pair_of_passes(timed: Callable[..., tuple[Clock, measuring.Report]]) -> None:
    _, found = timed([64, 64, 1], [64, 64, 3], 1)
    assert found.ratio == 3.0
    assert found.ratio_quartiles == [3.0, 3.0]


@pytest.mark.parametrize(("seconds", "pairs"), [(1e-3, 100), (0.25, 16), (60.0, 3)])
def test_number_of_passes_fits_the_time(
    seconds: float, pairs: int, timed: Callable[..., tuple[Clock, measuring.Report]]
) -> None:
    clock, found = timed(repeat(seconds), repeat(seconds), None)
    assert found.repeats == pairs
    assert len(clock.passes) == 4 + 2 * pairs


def test_progress(timed: Callable[..., tuple[Clock, measuring.Report]]) -> None:
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
