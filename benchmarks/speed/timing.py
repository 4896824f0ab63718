"""Interleaved timing, the bytes that autograd saves, and the machine a result was measured on."""

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeAlias

import torch
from torch import Tensor

import simam

MIN_TURN_SECONDS = 200e-6
MIN_ROUNDS = 5

Call: TypeAlias = Callable[[], object]
# Makes a call a number of times. Returns a function that gives the seconds per call; what it has
# to wait for, it waits for only then.
Clock: TypeAlias = Callable[[Call, int], Callable[[], float]]


def wall_clock(call: Call, repeats: int) -> Callable[[], float]:
    """Wall-clock time, for calls that have finished their work when they return."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - start) / repeats
    return lambda: seconds


def synchronized_clock(call: Call, repeats: int) -> Callable[[], float]:
    """Wall-clock time until the GPU is idle, for whole models: the host's time counts."""

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall_clock(call_and_wait, repeats)


def gpu_clock(call: Call, repeats: int) -> Callable[[], float]:
    """Time on the GPU between two events, for single kernels: the host's time does not count.

    Waiting for the GPU between two calls would leave it idle until the host has launched the next
    kernel, and that gap would count. So nothing waits until the clock is read.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()

    def read() -> float:
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / repeats

    return read


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    *,
    warm: bool = True,
    clock: Clock = wall_clock,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Time several calls in alternation.

    In every round each call has one turn, so a change of the machine's speed affects all calls
    alike. Rounds start with another call each time and alternate in direction, so no call always
    follows the same one. A call that takes less than 200 us is repeated within its turn.

    Args:
        calls (mapping of str to callable): what to time, by name.
        seconds (float): start new rounds for this long.
        warm (bool): begin each turn with an untimed call, since calls leave the caches in
            different states.
        clock (Clock): how a turn is timed; read at the end of the round.
        min_rounds (int): number of rounds even if `seconds` have passed.

    Returns:
        dict of str to list of float: for each name the seconds per call, one value per round.
    """
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    done, end = 0, time.perf_counter() + seconds
    while done < min_rounds or time.perf_counter() < end:
        direction = -1 if done % 2 else 1
        readings = {}
        for i in range(len(names)):
            name = names[(done + direction * i) % len(names)]
            if warm:
                calls[name]()
            readings[name] = clock(calls[name], repeats[name])
        for name, read in readings.items():
            times[name].append(read())
        done += 1
    return times


def _repeats(call: Call, clock: Clock) -> int:
    call()  # the first call may compile
    repeats = 1
    while clock(call, repeats)() * repeats < MIN_TURN_SECONDS:
        repeats *= 2
    return repeats


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return quantiles(values, n=4, method="inclusive")


def saved_bytes(call: Call, exclude: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd saves for backward while a call runs.

    Every storage counts once and as a whole, however many views of it are saved.

    Args:
        call (callable): the forward pass, or a whole training step.
        exclude (iterable of Tensor): tensors whose storages do not count, such as a model's
            parameters, which exist anyway.

    Returns:
        int: the number of bytes.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def keep_memory() -> bool:
    """Make glibc keep freed memory; return whether that is possible on this system.

    By default glibc returns large blocks to the system. A layer with many intermediate results
    then requests them again in every call, and the page faults, whose cost depends on the machine,
    can take longer than its arithmetic.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # as numbered in malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def machine_info(**options: object) -> dict[str, object]:
    """What timings depend on, for the JSON: processor, threads, versions, kernels, options."""
    names = ("torch", "timm", "torchvision")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"simam": simam.__version__} | {name: version(name) for name in names},
        "kernels": [str(entry) for entry in simam.kernels_info()],
        **options,
    }


def write_results(path: Path, info: dict[str, object], cases: list[dict[str, Any]]) -> None:
    """Write the JSON of a benchmark: `machine_info` and the measured cases."""
    path.write_text(json.dumps(info | {"cases": cases}, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
