"""Time one layer on a GPU: simam beside a clone, the formula, and timm's attention. See gpu.py."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from benchmarks.speed.op import TIMM, formula
from benchmarks.speed.timing import quartiles
from simam.functional import simam

DEVICE = "cuda"
# All of at least 64 MB in bfloat16; the first three are also tuned for.
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
# Reads and writes of the map that each pass cannot do without; a clone has two.
TRAFFIC = {"forward": 2, "backward": 3}

# Share of the bandwidth of clone at least; then the largest ratio of simam's time to others'.
GOALS = {
    "bandwidth": {"forward": 0.90, "backward": 0.85},
    "formula": {"forward": 0.20, "backward": 0.20},
    "formula compiled": {"forward": 1.0, "backward": 1.0},
    "formula tuned": {"forward": 1.0, "backward": 1.0},
    "each of timm": {"forward": 1.0, "backward": 1.0},
    "contiguous": {"forward": 1.1, "backward": 1.1},  # of channels_last
}


def cases(end: float) -> Iterator[dict[str, Any]]:
    """The cases of the JSON, for as long as there is time."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                if time.perf_counter() > end:
                    return
                yield measure(shape, dtype, layout)


def measure(name: str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """Microseconds of each candidate, forward and backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = [int(size) for size in name.split("x")]
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    calls = {key: partial(f, x) for key, f in functions(name, shape[1], dtype).items()}
    check(x)
    case = {"shape": name, "layout": layout, "dtype": str(dtype)[6:], "bytes": x.nbytes}
    with torch.no_grad():
        case["forward"] = medians(calls)
    x.requires_grad_()
    pull = torch.randn_like(x)
    clone = calls.pop("clone")
    case["backward"] = {}
    # One after the other, since each keeps its own copies of the map.
    for key, call in calls.items():
        output = call()
        pass_back = partial(torch.autograd.grad, output, x, pull, retain_graph=True)
        both = medians({key: pass_back, "clone": partial(torch.clone, pull)})
        case["backward"][key] = both[key] / both["clone"]
        del output, pass_back
        gc.collect()
    with torch.no_grad():
        scale = medians({"clone": clone})["clone"]
    case["backward"] = {key: scale * ratio for key, ratio in case["backward"].items()}
    case["backward"]["clone"] = scale
    torch.cuda.empty_cache()
    return case


def functions(name: str, channels: int, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """What is timed, by name."""
    found: dict[str, Callable[..., Tensor]] = {
        "clone": torch.clone,
        "simam": simam,
        "formula": formula,
        "formula compiled": torch.compile(formula, dynamic=False),
    }
    if name in TUNED:
        tuned = torch.compile(formula, dynamic=False, mode="max-autotune-no-cudagraphs")
        found["formula tuned"] = tuned
    if name.count("x") == 3:
        layers: dict[str, nn.Module] = {key: create_attn(key, channels) for key in TIMM}
        found |= {key: layer.to(DEVICE, dtype) for key, layer in layers.items()}
    return found


def check(x: Tensor) -> None:
    """Refuse to time a kernel that does not compute what the formula does."""
    part = x[:2]
    expected, actual = formula(part.double()), simam(part).double()
    gap = ((actual - expected).abs() / expected.abs().clamp_min(1e-6)).max().item()
    if not gap < 2 * torch.finfo(x.dtype).eps + 1e-5:
        raise RuntimeError(f"simam differs from the formula by {gap:.1e} on {tuple(x.shape)}")


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds on the GPU, in turns; median."""
    for call in calls.values():
        for _ in range(2):  # the first call may compile
            call()
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        events = {}
        for key, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            events[key] = start, stop
        torch.cuda.synchronize()
        for key, (start, stop) in events.items():
            times[key].append(1e3 * start.elapsed_time(stop))
    return {key: quartiles(each)[1] for key, each in times.items()}


def ratios(
    case: dict[str, Any], kind: str, contiguous: dict[str, Any] | None
) -> dict[str, float | None]:
    """What the goals are about, as far as it was measured."""
    times = case[kind]
    ours = times["simam"]
    found: dict[str, float | None] = dict.fromkeys(GOALS)
    found["bandwidth"] = times["clone"] / 2 * TRAFFIC[kind] / ours
    for name in ("formula", "formula compiled", "formula tuned"):
        found[name] = ours / times[name] if name in times else None
    if TIMM[0] in times:
        found["each of timm"] = ours / min(times[name] for name in TIMM)
    if contiguous is not None and contiguous is not case:
        found["contiguous"] = ours / contiguous[kind]["simam"]
    return found


def table(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table of ratios, those beyond their goal marked by !."""
    yield f"{'simam':54}" + "".join(f"{'/ ' * (g != 'bandwidth') + g:>18}" for g in GOALS)
    plain = {(c["shape"], c["dtype"]): c for c in measured if c["layout"] == "contiguous"}
    for case in measured:
        for kind in PASSES:
            found = ratios(case, kind, plain.get((case["shape"], case["dtype"])))
            line = f"{case['shape']:16}{case['dtype']:10}{case['layout']:15}{kind:13}"
            for name, goal in GOALS.items():
                ratio = found[name]
                if ratio is None:
                    line += f"{'-  ':>18}"
                    continue
                missed = ratio < goal[kind] if name == "bandwidth" else ratio > goal[kind]
                line += f"{ratio:16.2f} {'!' if missed else ' '}"
            yield line
