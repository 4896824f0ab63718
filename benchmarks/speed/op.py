"""Time one layer: simam beside a copy, torch's sigmoid, the formula, and timm's attention.

Prints the medians and how simam stands to its goals. Takes minutes.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from benchmarks.speed.timing import facts, interleave, keep_memory, quartiles, write
from simam.functional import simam

RESULTS = Path(__file__).parent / "results"
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
LARGE = 1e6  # bytes; goals are for tensors of at least this size

Calls: TypeAlias = dict[str, tuple[Callable[..., Any], Tensor]]

# Largest ratio of simam to each, forward and forward+backward.
GOALS = {
    "formula": (0.20, 0.12),
    "formula compiled": (0.45, 0.40),
    "sigmoid": (1.0, math.inf),
    "each of timm": (1.0, 0.6),
    "contiguous": (1.2, 1.2),  # of channels_last
    "float32": (1.0, 1.0),  # of bfloat16
    "bytes": (math.inf, 1.0),  # of what is saved for backward, to those of x
}


def formula(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    """The formula of the paper as one would write it down, with shared statistics."""
    spatial = tuple(range(2, x.dim()))
    others = math.prod(x.shape[2:]) - 1
    square = (x - x.mean(spatial, keepdim=True)) ** 2
    variance = square.sum(spatial, keepdim=True) / others
    return x * torch.sigmoid(square / (4 * (variance + e_lambda)) + 0.5)


def candidates(shape: Sequence[int], layout: str) -> Calls:
    """What is timed, by name, and what it is called with."""
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
    found = {name: (function, x) for name, function in functions.items()}
    for dtype in (torch.bfloat16, torch.float16):
        narrow, suffix = x.to(dtype), str(dtype).removeprefix("torch.")
        found |= {f"{name} {suffix}": (functions[name], narrow) for name in ("sigmoid", "simam")}
    return found


def measure(name: str, layout: str, seconds: float) -> dict[str, Any]:
    """One case of the JSON: microseconds, and bytes saved for backward by those of x."""
    torch._dynamo.reset()
    calls = candidates([int(size) for size in name.split("x")], layout)
    case: dict[str, Any] = {"shape": name, "layout": layout, "bytes": calls["copy"][1].nbytes}
    for kind, time in zip(PASSES, (time_forward, time_both), strict=True):
        times = time(calls, seconds)
        us = {key: quartiles([1e6 * t for t in each]) for key, each in times.items()}
        case[kind] = {key: median for key, (_, median, _) in us.items()}
        case[f"{kind} quartiles"] = {key: [first, third] for key, (first, _, third) in us.items()}
        case[f"{kind} rounds"] = len(times["copy"])
    return case | {"saved": {key: saved(function, x) for key, (function, x) in calls.items()}}


def time_forward(calls: Calls, seconds: float) -> dict[str, list[float]]:
    """Seconds of each as in inference."""
    for function, _ in calls.values():
        if isinstance(function, nn.Module):
            function.eval()
    with torch.no_grad():
        return interleave({key: partial(*call) for key, call in calls.items()}, seconds)


def time_both(calls: Calls, seconds: float) -> dict[str, list[float]]:
    """Seconds of each as in training, with a fixed random cotangent."""
    for function, x in calls.values():
        if isinstance(function, nn.Module):
            function.train()
        x.requires_grad_()
    inputs = {x.dtype: x for _, x in calls.values()}
    cotangents = {dtype: torch.randn_like(x) for dtype, x in inputs.items()}
    steps = {key: partial(step, f, x, cotangents[x.dtype]) for key, (f, x) in calls.items()}
    return interleave(steps, seconds)


def step(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> None:
    """Forward and backward, with fresh gradients."""
    x.grad = None
    if isinstance(function, nn.Module):
        function.zero_grad()
    function(x).backward(cotangent)


def saved(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Bytes kept from forward to backward, without the layer's own tensors, by those of x."""
    own = function.state_dict(keep_vars=True) if isinstance(function, nn.Module) else {}
    known = {tensor.data_ptr() for tensor in own.values()}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(sizes.values()) / x.nbytes


def show(case: dict[str, Any]) -> None:
    """Print the times of one case."""
    title = f"{case['shape']} {case['layout']}, {case['bytes'] / 1e6:.3g} MB"
    print(f"\n{title:36}{'forward':>12}{'forward+backward':>20}{'saved / x':>12}")
    forward, both = (case[kind] for kind in PASSES)
    for name, multiple in case["saved"].items():
        print(f"{name:36}{forward[name]:9.1f} us{both[name]:17.1f} us{multiple:12.3f}")


def ratios(case: dict[str, Any], kind: str, contiguous: dict[str, Any] | None) -> dict[str, float]:
    """What the goals are about, as far as it was measured."""
    times = case[kind]
    ours = times["simam"]
    found = {name: ours / times[name] for name in ("formula", "formula compiled", "sigmoid")}
    if "se" in times:
        found["each of timm"] = ours / min(times[name] for name in TIMM)
    if contiguous is not None and contiguous is not case:
        found["contiguous"] = ours / contiguous[kind]["simam"]
    found["float32"] = times["simam bfloat16"] / ours
    found["bytes"] = case["saved"]["simam"]
    return found


def goals(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table of ratios, those beyond their goal marked by !."""
    yield f"\n{'simam /':49}" + "".join(f"{name:>18}" for name in GOALS)
    for i, kind in enumerate(PASSES):
        goal = "".join(f"{goal[i]:18.2f}" for goal in GOALS.values())
        yield f"{kind + ', at most':49}" + goal.replace("inf", "  -")
    contiguous = {case["shape"]: case for case in cases if case["layout"] == "contiguous"}
    for case in (case for case in cases if case["bytes"] >= LARGE):
        for i, kind in enumerate(PASSES):
            found = ratios(case, kind, contiguous.get(case["shape"]))
            line = f"{case['shape']:15}{case['layout']:15}{kind:19}"
            for name, goal in GOALS.items():
                ratio = found.get(name)
                text = "-" if ratio is None else f"{ratio:.3f} {'!' if ratio > goal[i] else ' '}"
                if name == "each of timm" and ratio is not None:
                    text = f"{min(TIMM, key=case[kind].__getitem__)} {text}"
                line += f"{text:>18}"
            yield line


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each shape, layout and pass"
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxCxHxW")
    parser.add_argument("--json", type=Path, default=RESULTS / "op.json")
    parser.add_argument(
        "--keep-memory", action="store_true", help="without page faults: see timing.keep_memory"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_memory()

    machine, cases = facts(seconds=options.seconds, memory_kept=kept), []
    for shape in options.shapes:
        for layout in LAYOUTS:
            cases.append(measure(shape, layout, options.seconds))
            show(cases[-1])
            write(options.json, machine, cases)
    print(*goals(cases), sep="\n")


if __name__ == "__main__":
    main()
