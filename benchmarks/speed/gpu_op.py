"""Times one layer on a GPU: simam, a clone, the formula, timm's layers. Used by gpu.py."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from simam.functional import simam
from simam.messages import table

from .op import TIMM, formula
from .timing import Call, gpu_clock, interleave

DEVICE = "cuda"
# Each has at least 64 MB in bfloat16; the first three are also timed with max-autotune.
SHAPES = (
    "256x64x56x56",
    "1024x256x14x14",
    "2048x512x7x7",
    "512x128x28x28",
    "64x64x112x112",
    "4x64x512x512",
    "16x64x16x56x56",
    "128x64x8000",
)
TUNED = SHAPES[:3]
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "backward")
ROUNDS = 15
# Number of maps that each pass must at least read or write; for a clone it is two.
TRAFFIC = {"forward": 2, "backward": 3}

# Smallest share of the bandwidth of clone, then largest ratio of simam's time to each other time.
GOALS = {
    "bandwidth": {"forward": 0.90, "backward": 0.85},
    "formula": {"forward": 0.20, "backward": 0.20},
    "formula compiled": {"forward": 1.0, "backward": 1.0},
    "formula tuned": {"forward": 1.0, "backward": 1.0},
    "fastest of timm": {"forward": 1.0, "backward": 1.0},
    "contiguous": {"forward": 1.1, "backward": 1.1},  # channels_last to contiguous
}


def cases(end: float) -> Iterator[dict[str, Any]]:
    """Measure cases of the JSON; start no new one after `end`, a time of time.perf_counter."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                if time.perf_counter() > end:
                    return
                yield measure(shape, dtype, layout)


def measure(name: str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """Measure one case.

    Returns:
        dict: shape, layout, dtype and bytes of x; for each of `PASSES` the median microseconds by
            candidate.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = [int(size) for size in name.split("x")]
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    calls = {key: partial(f, x) for key, f in candidates(name, shape[1], dtype).items()}
    check(x)
    with torch.no_grad():
        forward = medians(calls)
    x.requires_grad_()
    grad_output = torch.randn_like(x)
    clone = calls.pop("clone")
    clone_ratios = {}
    # Each candidate saves copies of the map for backward, which together may not fit the memory.
    # So each is timed in alternation with clone alone.
    for key, call in calls.items():
        output = call()
        backward = partial(torch.autograd.grad, output, x, grad_output, retain_graph=True)
        both = medians({key: backward, "clone": partial(torch.clone, grad_output)})
        clone_ratios[key] = both[key] / both["clone"]
        del output, backward
        gc.collect()
    with torch.no_grad():
        clone_us = medians({"clone": clone})["clone"]
    torch.cuda.empty_cache()
    return {
        "shape": name,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": x.nbytes,
        "forward": forward,
        "backward": {key: clone_us * ratio for key, ratio in clone_ratios.items()}
        | {"clone": clone_us},
    }


def candidates(name: str, channels: int, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """The functions and layers to time, by name."""
    from timm.layers import create_attn

    functions: dict[str, Callable[..., Tensor]] = {
        "clone": torch.clone,
        "simam": simam,
        "formula": formula,
        "formula compiled": torch.compile(formula, dynamic=False),
    }
    if name in TUNED:
        tuned = torch.compile(formula, dynamic=False, mode="max-autotune-no-cudagraphs")
        functions["formula tuned"] = tuned
    if name.count("x") == 3:
        layers: dict[str, nn.Module] = {key: create_attn(key, channels) for key in TIMM}
        functions |= {key: layer.to(DEVICE, dtype) for key, layer in layers.items()}
    return functions


def check(x: Tensor) -> None:
    """Refuse to time a kernel whose result differs from that of the formula."""
    samples = x[:2]
    expected, actual = formula(samples.double()), simam(samples).double()
    gap = ((actual - expected).abs() / expected.abs().clamp_min(1e-6)).max().item()
    if not gap < 2 * torch.finfo(x.dtype).eps + 1e-5:
        raise RuntimeError(f"simam differs from the formula by {gap:.1e} on {tuple(x.shape)}")


def medians(calls: Mapping[str, Call]) -> dict[str, float]:
    """Median microseconds of each call on the GPU, timed in alternation."""
    times = interleave(calls, 0, warm=False, clock=gpu_clock, min_rounds=ROUNDS)
    return {key: 1e6 * median(each) for key, each in times.items()}


def ratios(case: dict[str, Any], kind: str, contiguous: dict[str, Any] | None) -> dict[str, float]:
    """The ratios that have goals, as far as they were measured."""
    times = case[kind]
    ours = times["simam"]
    result = {"bandwidth": times["clone"] / 2 * TRAFFIC[kind] / ours}
    for name in ("formula", "formula compiled", "formula tuned"):
        if name in times:
            result[name] = ours / times[name]
    if TIMM[0] in times:
        result["fastest of timm"] = ours / min(times[name] for name in TIMM)
    if contiguous is not None and contiguous is not case:
        result["contiguous"] = ours / contiguous[kind]["simam"]
    return result


def goal_table(measured: Sequence[dict[str, Any]]) -> str:
    """The ratios of all cases; a ratio beyond its goal is marked by !."""
    return table(list(_goal_rows(measured)), "<<<<" + ">" * len(GOALS))


def _goal_rows(measured: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    heads = (name if name == "bandwidth" else f"/ {name}" for name in GOALS)
    yield ["simam", "", "", "", *(f"{head}  " for head in heads)]
    contiguous = {(c["shape"], c["dtype"]): c for c in measured if c["layout"] == "contiguous"}
    for case in measured:
        for kind in PASSES:
            found = ratios(case, kind, contiguous.get((case["shape"], case["dtype"])))
            row = [case["shape"], case["dtype"], case["layout"], kind]
            for name, goal in GOALS.items():
                if name not in found:
                    row.append("-  ")
                    continue
                ratio = found[name]
                missed = ratio < goal[kind] if name == "bandwidth" else ratio > goal[kind]
                row.append(f"{ratio:.2f} {'!' if missed else ' '}")
            yield row
