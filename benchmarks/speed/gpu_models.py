"""Times whole models on a GPU: plain, with the authors' formula, with simam. Used by gpu.py."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import simam
from simam.messages import table

from .models import variants
from .timing import Call, interleave, quartiles, synchronized_clock

DEVICE = "cuda"
MODELS = ("resnet50", "mobilenet_v2")
# What is timed, and the number of images.
TASKS = (
    ("inference", 1),
    ("inference, CUDA graph", 1),
    ("inference", 256),
    ("training", 256),
)
LARGE_BATCH = 16  # batches of at least this size are channels_last, and bfloat16 by autocast
SECONDS = 10.0

# Largest ratio of simam's time to that of the plain model.
GOALS = {
    ("resnet50", "training"): 1.03,
    ("mobilenet_v2", "training"): 1.08,
    ("resnet50", "inference, CUDA graph"): 1.05,
    ("mobilenet_v2", "inference, CUDA graph"): 1.05,
}


def cases(end: float) -> Iterator[dict[str, Any]]:
    """Measure cases of the JSON; start no new one after `end`, a time of time.perf_counter."""
    from torchvision.models import get_model

    for name in MODELS:
        torch.manual_seed(0)
        plain = get_model(name, weights=None).to(DEVICE, memory_format=torch.channels_last)
        models = variants(plain)
        for task, batch in TASKS:
            if time.perf_counter() > end:
                return
            yield measure(name, models, task, batch)


def measure(name: str, models: dict[str, nn.Module], task: str, batch: int) -> dict[str, Any]:
    """Measure one case.

    Returns:
        dict: model, task, batch and rounds; under "ms" the quartiles of the milliseconds by
            variant; under "ratio" the quartiles of the time divided, round by round, by the time
            of the plain model; under "peak bytes" the peak memory by variant; under "activation
            bytes" the size of all outputs of simam.
    """
    x = torch.randn(batch, 3, 224, 224, device=DEVICE)
    if batch >= LARGE_BATCH:
        x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Call] = {}
    for key, model in models.items():
        if task == "training":
            optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
            labels = torch.randint(1000, (batch,), device=DEVICE)
            calls[key] = partial(train, model.train(), optimizer, x, labels)
        else:
            calls[key] = partial(infer, model.eval(), x)
            if task == "inference, CUDA graph":
                calls[key] = capture(calls[key])
    peaks = {key: peak_bytes(call) for key, call in calls.items()}
    times = interleave(calls, SECONDS, warm=False, clock=synchronized_clock)
    ratios = {
        key: quartiles([t / p for t, p in zip(each, times["plain"], strict=True)])
        for key, each in times.items()
    }
    return {
        "model": name,
        "task": task,
        "batch": batch,
        "rounds": len(times["plain"]),
        "ms": {key: quartiles([1e3 * t for t in each]) for key, each in times.items()},
        "ratio": {key: each for key, each in ratios.items() if key != "plain"},
        "peak bytes": peaks,
        "activation bytes": output_bytes(models["simam"], x),
    }


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Run forward without gradients."""
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=len(x) >= LARGE_BATCH):
        return cast(Tensor, model(x))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    """Run a whole training step."""
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def capture(call: Call) -> Call:
    """Capture a call in a CUDA graph; return the function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture cannot do
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call) -> int:
    """Peak of the bytes allocated while a call runs, minus those allocated before it."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def output_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all outputs of simam: the memory that it may add to training.

    This is a limit, so it comes from the sizes of the maps, not from what simam saves.
    """
    sizes = []

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.nbytes)

    layers = [module for module in model.modules() if isinstance(module, simam.SimAM)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    infer(model.eval(), x)
    for handle in handles:
        handle.remove()
    return sum(sizes)


def goal_table(measured: Sequence[dict[str, Any]]) -> str:
    """The results of all cases; a result beyond its goal is marked by !."""
    return table(list(_goal_rows(measured)), "<<" + ">" * 7)


def _goal_rows(measured: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    yield [
        "model",
        "task",
        "batch",
        "plain, ms",
        "formula / plain",
        "simam / plain  ",
        "goal",
        "more memory, MB  ",
        "activations, MB",
    ]
    for case in measured:
        goal = GOALS.get((case["model"], case["task"]))
        ratio = {key: middle for key, (_, middle, _) in case["ratio"].items()}
        slow = goal is not None and ratio["simam"] > goal
        more = case["peak bytes"]["simam"] - case["peak bytes"]["plain"]
        large = case["task"] == "training" and more > case["activation bytes"]
        yield [
            case["model"],
            case["task"],
            str(case["batch"]),
            f"{case['ms']['plain'][1]:.2f}",
            f"{ratio['formula']:.3f}",
            f"{ratio['simam']:.3f} {'!' if slow else ' '}",
            f"{goal:.2f}" if goal else "-",
            f"{more / 1e6:.0f} {'!' if large else ' '}",
            f"{case['activation bytes'] / 1e6:.0f}",
        ]
