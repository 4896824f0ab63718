"""Timings that take turns, and the machine they were taken on."""

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

import simam

SHORTEST = 200e-6
FEWEST_ROUNDS = 5


def keep_memory() -> bool:
    """Have glibc keep what is freed; elsewhere tell that it cannot be done.

    By default a layer with many intermediate results gives them back to the system and asks for
    them anew at every call, and the page faults, whose price is the machine's, may outweigh what
    it computes.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # as numbered in malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def interleave(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds that each call takes, round by round, for so long but at least five rounds.

    In a round each has its turn, so that a change of the machine's speed meets all. From round to
    round another one starts and the direction turns, so that none always follows the same. If
    warm, a turn starts with a call that does not count, since some leave more in the caches than
    others. What takes less than 200 us is repeated within its turn.
    """
    repeats = {name: _repeats(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    done, end = 0, time.perf_counter() + seconds
    while done < FEWEST_ROUNDS or time.perf_counter() < end:
        first = done % len(names)
        order = names[first:] + names[:first]
        for name in order[:: -1 if done % 2 else 1]:
            if warm:
                calls[name]()
            times[name].append(_time(calls[name], repeats[name]))
        done += 1
    return times


def _repeats(call: Callable[[], object]) -> int:
    call()  # the first call may compile
    repeats = 1
    while _time(call, repeats) * repeats < SHORTEST:
        repeats *= 2
    return repeats


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def saved_bytes(call: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while `call()` runs; each storage counts once.

    Args:
        call (callable): runs a forward pass.
        exclude (iterable of Tensor): tensors whose storages do not count, such as parameters.
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


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return quantiles(values, n=4, method="inclusive")


def facts(**options: object) -> dict[str, object]:
    """What timings depend on, for the JSON."""
    names = ("torch", "timm", "torchvision")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"simam": simam.__version__} | {name: version(name) for name in names},
        "kernels": [str(entry) for entry in simam.kernels_info()],
        **options,
    }


def write(path: Path, about: dict[str, object], cases: list[dict[str, Any]]) -> None:
    """Write the JSON."""
    path.write_text(json.dumps(about | {"cases": cases}, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
