"""Time one layer on a CPU: simam, a copy, torch's sigmoid, the formula, timm's attention layers.

Prints the medians of every case, then a table that compares simam with its goals. Writes JSON.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from simam.functional import simam
from simam.messages import table

from .options import add_timing_options, require_packages
from .timing import (
    interleave,
    keep_memory,
    machine_info,
    quartiles,
    saved_bytes,
    write_results,
)

SHAPES = (
    "8x64x56x56",
    "32x64x56x56",
    "32x128x28x28",
    "32x256x14x14",
    "32x512x7x7",
    "1x64x112x112",
    "1x512x7x7",
    "2x64x512x512",
    "8x64x16x56x56",
    "16x64x8000",
    "1x16x4x4",
)
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "forward+backward")
TIMM = ("se", "ese", "eca", "gc", "cbam", "coord", "ela", "strip")
LARGE_BYTES = 1e6  # the goals are for tensors of at least this size

Candidates: TypeAlias = dict[str, tuple[Callable[..., Any], Tensor]]

# Largest ratio of simam's time to each other time, for forward and for forward+backward.
GOALS = {
    "formula": (0.20, 0.12),
    "formula compiled": (0.45, 0.40),
    "sigmoid": (1.0, math.inf),
    "fastest of timm": (1.0, 0.6),
    "contiguous": (1.2, 1.2),  # channels_last to contiguous
    "float32": (1.0, 1.0),  # bfloat16 to float32
    "bytes of x": (math.inf, 1.0),  # bytes saved for backward to the bytes of x
}


def formula(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    """The formula of the paper, with shared statistics, as one would write it in torch."""
    spatial = tuple(range(2, x.dim()))
    m_minus_1 = math.prod(x.shape[2:]) - 1
    square = (x - x.mean(spatial, keepdim=True)) ** 2
    variance = square.sum(spatial, keepdim=True) / m_minus_1
    return x * torch.sigmoid(square / (4 * (variance + e_lambda)) + 0.5)


def candidates(shape: Sequence[int], layout: str) -> Candidates:
    """The functions and layers to time, by name, each with its input."""
    from timm.layers import create_attn

    torch.manual_seed(0)
    x = torch.randn(*shape)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    functions: dict[str, Callable[..., Any]] = {
        "copy": torch.clone,
        "sigmoid": torch.sigmoid,
        "formula": formula,
        "formula compiled": torch.compile(formula, dynamic=False),
        "simam": simam,
        "simam compiled": torch.compile(simam, dynamic=False),
    }
    if len(shape) == 4:
        functions |= {name: create_attn(name, shape[1]) for name in TIMM}
    result = {name: (function, x) for name, function in functions.items()}
    for dtype in (torch.bfloat16, torch.float16):
        narrow, suffix = x.to(dtype), str(dtype).removeprefix("torch.")
        result |= {f"{name} {suffix}": (functions[name], narrow) for name in ("sigmoid", "simam")}
    return result


def measure(shape: str, layout: str, seconds: float) -> dict[str, Any]:
    """Measure one case of the JSON.

    Returns:
        dict: shape, layout and bytes of x; for each of `PASSES` the median microseconds by
            candidate, under "PASS quartiles" the first and third quartiles, and under "PASS rounds"
            the number of rounds; under "saved" the bytes saved for backward divided by those of x.
    """
    torch._dynamo.reset()
    calls = candidates([int(size) for size in shape.split("x")], layout)
    case: dict[str, Any] = {"shape": shape, "layout": layout, "bytes": calls["copy"][1].nbytes}
    for kind, time in zip(PASSES, (time_forward, time_forward_backward), strict=True):
        times = time(calls, seconds)
        us = {name: quartiles([1e6 * t for t in each]) for name, each in times.items()}
        case[kind] = {name: median for name, (_, median, _) in us.items()}
        case[f"{kind} quartiles"] = {name: [first, third] for name, (first, _, third) in us.items()}
        case[f"{kind} rounds"] = len(times["copy"])
    return case | {"saved": {name: saved(function, x) for name, (function, x) in calls.items()}}


def time_forward(calls: Candidates, seconds: float) -> dict[str, list[float]]:
    """Time the forward pass of each candidate, as in inference."""
    for function, _ in calls.values():
        if isinstance(function, nn.Module):
            function.eval()
    with torch.no_grad():
        passes = {name: partial(function, x) for name, (function, x) in calls.items()}
        return interleave(passes, seconds)


def time_forward_backward(calls: Candidates, seconds: float) -> dict[str, list[float]]:
    """Time forward and backward of each candidate, with a fixed random gradient of the output."""
    for function, x in calls.values():
        if isinstance(function, nn.Module):
            function.train()
        x.requires_grad_()
    inputs = {x.dtype: x for _, x in calls.values()}
    grad_outputs = {dtype: torch.randn_like(x) for dtype, x in inputs.items()}
    passes = {
        name: partial(forward_backward, function, x, grad_outputs[x.dtype])
        for name, (function, x) in calls.items()
    }
    return interleave(passes, seconds)


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> None:
    """Run forward and backward without accumulating gradients from earlier calls."""
    x.grad = None
    if isinstance(function, nn.Module):
        function.zero_grad()
    function(x).backward(grad_output)


def saved(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Bytes saved for backward, except parameters and buffers, divided by the bytes of x."""
    own = function.state_dict(keep_vars=True) if isinstance(function, nn.Module) else {}
    return saved_bytes(partial(function, x), exclude=own.values()) / x.nbytes


def print_case(case: dict[str, Any]) -> None:
    """Print the times of one case."""
    title = f"{case['shape']} {case['layout']}, {case['bytes'] / 1e6:.3g} MB"
    forward, both = (case[kind] for kind in PASSES)
    rows = [(title, *PASSES, "saved / x")]
    for name, multiple in case["saved"].items():
        rows.append((name, f"{forward[name]:.1f} us", f"{both[name]:.1f} us", f"{multiple:.3f}"))
    print("\n" + table(rows, "<>>>"), flush=True)


def ratios(case: dict[str, Any], kind: str, contiguous: dict[str, Any] | None) -> dict[str, float]:
    """The ratios that have goals, as far as they were measured."""
    times = case[kind]
    ours = times["simam"]
    result = {name: ours / times[name] for name in ("formula", "formula compiled", "sigmoid")}
    if TIMM[0] in times:
        result["fastest of timm"] = ours / min(times[name] for name in TIMM)
    if contiguous is not None and contiguous is not case:
        result["contiguous"] = ours / contiguous[kind]["simam"]
    result["float32"] = times["simam bfloat16"] / ours
    result["bytes of x"] = case["saved"]["simam"]
    return result


def goal_table(cases: Sequence[dict[str, Any]]) -> str:
    """The ratios of all large cases; a ratio beyond its goal is marked by !."""
    return table(list(_goal_rows(cases)), "<<<" + ">" * len(GOALS))


def _goal_rows(cases: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["simam /", "", "", *(f"{name}  " for name in GOALS)]
    for i, kind in enumerate(PASSES):
        limits = (goal[i] for goal in GOALS.values())
        yield [
            "at most",
            "",
            kind,
            *("-  " if math.isinf(limit) else f"{limit:.2f}  " for limit in limits),
        ]
    contiguous = {case["shape"]: case for case in cases if case["layout"] == "contiguous"}
    for case in (case for case in cases if case["bytes"] >= LARGE_BYTES):
        for i, kind in enumerate(PASSES):
            measured = ratios(case, kind, contiguous.get(case["shape"]))
            row = [case["shape"], case["layout"], kind]
            for name, goal in GOALS.items():
                if name not in measured:
                    row.append("-  ")
                    continue
                cell = f"{measured[name]:.3f} {'!' if measured[name] > goal[i] else ' '}"
                if name == "fastest of timm":
                    cell = f"{min(TIMM, key=case[kind].__getitem__)} {cell}"
                row.append(cell)
            yield row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.op", description=__doc__)
    add_timing_options(parser, 2.0, "each shape, layout and pass", "op.json")
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="NxCxHxW", help="default: all shapes"
    )
    options = parser.parse_args()
    require_packages(parser, "timm", "timm", "torchvision")
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_memory()

    info = machine_info(seconds=options.seconds, memory_kept=kept)
    cases: list[dict[str, Any]] = []
    for shape in options.shapes:
        for layout in LAYOUTS:
            cases.append(measure(shape, layout, options.seconds))
            print_case(cases[-1])
            write_results(options.json, info, cases)
    print("\n" + goal_table(cases))


if __name__ == "__main__":
    main()
