"""Time whole models on a GPU: plain, with the authors' formula, with simam. See gpu.py."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model

import simam
from benchmarks.speed.models import Formula, attached, settle
from benchmarks.speed.timing import quartiles

DEVICE = "cuda"
MODELS = ("resnet50", "mobilenet_v2")
# What is timed, and of how many images.
TASKS = (
    ("inference", 1),
    ("inference, CUDA graph", 1),
    ("inference", 256),
    ("training", 256),
)
LARGE = 16  # images from which on a batch is channels last, in bfloat16
SECONDS = 10.0

# Largest time by that of the plain model.
GOALS = {
    ("resnet50", "training"): 1.03,
    ("mobilenet_v2", "training"): 1.08,
    ("resnet50", "inference, CUDA graph"): 1.05,
    ("mobilenet_v2", "inference, CUDA graph"): 1.05,
}


def cases(end: float) -> Iterator[dict[str, Any]]:
    """The cases of the JSON, for as long as there is time."""
    for name in MODELS:
        torch.manual_seed(0)
        plain = get_model(name, weights=None).to(DEVICE, memory_format=torch.channels_last)
        found = {"plain": plain, "formula": attached(plain, Formula()), "simam": attached(plain)}
        for model in found.values():
            settle(model)
        for task, batch in TASKS:
            if time.perf_counter() > end:
                return
            yield measure(name, found, task, batch)


def measure(name: str, models: dict[str, nn.Module], task: str, batch: int) -> dict[str, Any]:
    """Milliseconds, their ratio to the plain model round by round, and the peak of memory."""
    x = torch.randn(batch, 3, 224, 224, device=DEVICE)
    if batch >= LARGE:
        x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {}
    for key, model in models.items():
        if task == "training":
            optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
            labels = torch.randint(1000, (batch,), device=DEVICE)
            calls[key] = partial(train, model.train(), optimizer, x, labels)
        else:
            calls[key] = partial(infer, model.eval(), x)
            if task == "inference, CUDA graph":
                calls[key] = capture(calls[key])
    peaks = {key: peak(call) for key, call in calls.items()}
    times = in_turns(calls)
    ratios = {
        key: quartiles([t / p for t, p in zip(each, times["plain"], strict=True)])
        for key, each in times.items()
    }
    return {
        "model": name,
        "task": task,
        "batch": batch,
        "rounds": len(times["plain"]),
        "ms": {key: quartiles(each) for key, each in times.items()},
        "ratio": {key: each for key, each in ratios.items() if key != "plain"},
        "peak bytes": peaks,
        "activation bytes": activations(models["simam"], x),
    }


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Forward, without gradients."""
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=len(x) >= LARGE):
        return model(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    """A whole step."""
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled before, outside of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most while the call runs, beyond those before."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds on the wall, since eager code may wait for the host."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + SECONDS
    while len(times["plain"]) < 5 or time.perf_counter() < end:
        for key, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[key].append(1e3 * (time.perf_counter() - start))
    return times


def activations(model: nn.Module, x: Tensor) -> int:
    """Bytes of the maps that SimAM makes, which training may keep once more."""
    sizes = []

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.nbytes)

    layers = [module for module in model.modules() if isinstance(module, simam.SimAM)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    infer(model.eval(), x)
    for handle in handles:
        handle.remove()
    return sum(sizes)


def table(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table, ratios beyond their goal marked by !."""
    yield f"{'model':14}{'task':24}{'batch':>6}{'plain, ms':>12}{'formula':>10}{'simam':>10}" + (
        f"{'goal':>8}{'more memory':>14}{'activations':>14}"
    )
    for case in measured:
        goal = GOALS.get((case["model"], case["task"]))
        ratio = {key: quartile[1] for key, quartile in case["ratio"].items()}
        more = case["peak bytes"]["simam"] - case["peak bytes"]["plain"]
        allowed = case["activation bytes"]
        line = f"{case['model']:14}{case['task']:24}{case['batch']:6}{case['ms']['plain'][1]:12.2f}"
        line += f"{ratio['formula']:10.3f}{ratio['simam']:10.3f}"
        line += f"{goal or '-':>6} {'!' if goal and ratio['simam'] > goal else ' '}"
        line += f"{more / 1e6:11.0f} MB{allowed / 1e6:11.0f} MB"
        yield line + (" !" if case["task"] == "training" and more > allowed else "")
