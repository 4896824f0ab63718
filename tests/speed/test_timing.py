"""The interleaving timer with fake clocks, and saved bytes counted by hand."""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.speed.timing import (
    Call,
    gpu_clock,
    interleave,
    saved_bytes,
    synchronized_clock,
)


class FakeClock:
    """Every call takes the given seconds; records when turns happen and when they are read."""

    def __init__(self, seconds: float, log: list[str]) -> None:
        self.seconds, self.log = seconds, log

    def __call__(self, call: Call, repeats: int) -> Callable[[], float]:
        self.log.append(f"turn of {repeats}")
        for _ in range(repeats):
            call()

        def read() -> float:
            self.log.append("read")
            return self.seconds

        return read


def rounds(log: list[str], names: str) -> list[str]:
    """The names in the order of their turns, one string for every round after the calibration."""
    turns = [entry for entry in log if entry in names]
    calibration = 2 * len(names)  # an untimed call of each, then a timed one
    turns = turns[calibration:]
    return ["".join(turns[i : i + len(names)]) for i in range(0, len(turns), len(names))]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a", ["a", "a", "a", "a"]),
        ("ab", ["ab", "ba", "ab", "ba"]),
        ("abc", ["abc", "bac", "cab", "acb"]),
        ("abcd", ["abcd", "badc", "cdab", "dcba"]),
    ],
)
def test_interleave_alternates_starts_and_directions(names: str, expected: list[str]) -> None:
    log: list[str] = []
    calls = {name: partial(log.append, name) for name in names}
    times = interleave(calls, 0, warm=False, clock=FakeClock(1.0, log), min_rounds=4)
    assert rounds(log, names) == expected
    assert times == {name: [1.0] * 4 for name in names}


def test_interleave_varies_the_preceding_call() -> None:
    log: list[str] = []
    calls = {name: partial(log.append, name) for name in "abcde"}
    interleave(calls, 0, warm=False, clock=FakeClock(1.0, log), min_rounds=10)
    turns = "".join(rounds(log, "abcde"))
    for name in "abcde":
        assert len({before for before, turn in pairwise(turns) if turn == name}) > 1
    assert {order[0] for order in rounds(log, "abcde")} == set("abcde")


def test_interleave_reads_clocks_at_the_end_of_a_round() -> None:
    log: list[str] = []
    calls = {name: partial(log.append, name) for name in "ab"}
    interleave(calls, 0, warm=False, clock=FakeClock(1.0, log), min_rounds=2)
    one_round = "turn of 1 {} turn of 1 {} read read"
    calibration = "a turn of 1 a read b turn of 1 b read"
    assert " ".join(log) == " ".join(
        [calibration, one_round.format("a", "b"), one_round.format("b", "a")]
    )


def test_interleave_warms_each_turn_up() -> None:
    log: list[str] = []
    calls = {name: partial(log.append, name) for name in "ab"}
    interleave(calls, 0, clock=FakeClock(1.0, log), min_rounds=1)
    assert " ".join(log).endswith("a turn of 1 a b turn of 1 b read read")


def test_interleave_repeats_fast_calls() -> None:
    log: list[str] = []
    clock = FakeClock(60e-6, log)
    times = interleave({"a": lambda: None}, 0, warm=False, clock=clock, min_rounds=3)
    # 60 and 120 us are less than 200 us, 240 us are not.
    turns = [entry for entry in log if entry != "read"]
    assert turns == ["turn of 1", "turn of 2", "turn of 4", *["turn of 4"] * 3]
    assert times == {"a": [60e-6] * 3}


def test_interleave_starts_rounds_for_the_given_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def second_passes() -> None:
        nonlocal now
        now += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert interleave({"a": second_passes}, 12, warm=False) == {"a": [1.0] * 12}
    assert interleave({"a": second_passes}, 2, warm=False) == {"a": [1.0] * 5}


def test_gpu_clock_waits_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, stop: "Event") -> float:
            assert stop is not self
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    read = gpu_clock(partial(log.append, "call"), 3)
    assert log == ["record", "call", "call", "call", "record"]
    assert read() == pytest.approx(2e-3)
    assert log[5:] == ["wait"]


def test_synchronized_clock_waits_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    read = synchronized_clock(partial(log.append, "call"), 2)
    assert log == ["wait", "call", "wait", "call", "wait"]
    assert 0 < read() < 60


def test_saved_bytes_counts_a_shared_storage_once() -> None:
    x = torch.ones(100, requires_grad=True)
    # x * x saves x twice, sin saves it once more; the product saves the two results.
    assert saved_bytes(lambda: (x * x) * x.sin()) == 3 * 400


def test_saved_bytes_counts_the_whole_storage_of_a_view() -> None:
    x = torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x[:10].sin() + x[90:].cos()) == 400


def test_saved_bytes_leaves_excluded_tensors_out() -> None:
    layer, x = nn.Linear(10, 10), torch.ones(5, 10, requires_grad=True)
    # The layer saves x, 200 bytes, and a transposed view of its weight, 400 bytes.
    assert saved_bytes(lambda: layer(x)) == 200 + 400
    assert saved_bytes(lambda: layer(x), exclude=layer.parameters()) == 200


def test_saved_bytes_is_zero_without_gradient() -> None:
    x = torch.ones(100)
    assert saved_bytes(lambda: x * x) == 0
