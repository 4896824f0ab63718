"""Time a YOLO-like network with five hand-written copies of SimAM, before and after simam.convert.

Prints the time of a forward pass and of a training step, and the bytes kept for backward.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import simam
from simam.messages import table

from .models import infer, train
from .op import formula
from .options import add_timing_options, require_packages
from .timing import (
    Call,
    interleave,
    keep_memory,
    machine_info,
    quartiles,
    saved_bytes,
    write_results,
)

TASKS = (("inference", 1, 640), ("inference", 8, 320), ("training", 8, 320))
WIDTHS = (16, 32, 64, 128, 256)


class SimAMCopy(nn.Module):
    """SimAM as networks carry it: the formula in torch operations."""

    def __init__(self, channels: int, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        return formula(x, self.e_lambda)


class Conv(nn.Sequential):
    """Convolution, norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class Stage(nn.Module):
    """Halve the map, then two residual blocks of which every result is kept, as in YOLOv8."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.down = Conv(inputs, outputs, 3, 2)
        self.split = Conv(outputs, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(2)
        )
        self.join = Conv(4 * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.down(x)).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return cast(Tensor, self.join(torch.cat(parts, 1)))


def network(*, attention: bool) -> nn.Sequential:
    """Build the network, with a copy of SimAM behind each of its five parts or without."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [Conv(3, WIDTHS[0], 3, 2)]
    parts += [Stage(a, b) for a, b in itertools.pairwise(WIDTHS)]
    layers: list[nn.Module] = []
    for part, width in zip(parts, WIDTHS, strict=True):
        layers += [part, SimAMCopy(width)] if attention else [part]
    return nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 84, 1))


def variants() -> dict[str, nn.Module]:
    """The network without SimAM, with copies, and with the copies converted."""
    copies = network(attention=True)
    converted = simam.convert(copy.deepcopy(copies))
    return {"plain": network(attention=False), "copies": copies, "converted": converted}


def measure(
    seconds: float, tasks: tuple[tuple[str, int, int], ...] = TASKS
) -> Iterator[dict[str, Any]]:
    """Measure the network, once for each task.

    Yields:
        dict: task, batch, size (the side of the image) and rounds; under "ms" the quartiles of the
            milliseconds by variant; under "ratio" the quartiles of the time divided, round by
            round, by the time with copies; under "saved" the bytes that autograd keeps for
            backward, without the parameters.
    """
    for task, batch, size in tasks:
        models = variants()
        x = torch.rand(batch, 3, size, size)
        check(models, x)
        grad_output = torch.randn(batch, 84, size // 32, size // 32)
        calls: dict[str, Call]
        if task == "inference":
            calls = {name: partial(infer, model.eval(), x) for name, model in models.items()}
        else:
            calls = {name: partial(train, m.train(), x, grad_output) for name, m in models.items()}
        times = interleave(calls, seconds, warm=False)
        yield {
            "task": task,
            "batch": batch,
            "size": size,
            "rounds": len(times["copies"]),
            "ms": {name: quartiles([1e3 * t for t in each]) for name, each in times.items()},
            "ratio": {
                name: quartiles([t / c for t, c in zip(each, times["copies"], strict=True)])
                for name, each in times.items()
            },
            "saved": {
                name: saved_bytes(partial(model.train(), x), exclude=model.parameters())
                for name, model in models.items()
            },
        }


def check(models: dict[str, nn.Module], x: Tensor) -> None:
    """Refuse to time a network that convert has changed, or that it has not converted."""
    layers = [module for module in models["converted"].modules() if isinstance(module, simam.SimAM)]
    if len(layers) != len(WIDTHS):
        raise RuntimeError(f"expected {len(WIDTHS)} converted layers, got {len(layers)}")
    before, after = (infer(models[name].eval(), x) for name in ("copies", "converted"))
    gap = ((before - after).norm() / before.norm()).item()
    if not gap < 1e-4:
        raise RuntimeError(f"the output after convert differs by {gap:.1e}")


def summary(cases: list[dict[str, Any]]) -> str:
    """Format the cases as a table."""
    head = ["task", "batch", "size", *(f"{n} ms" for n in ("plain", "copies", "converted"))]
    rows = [[*head, "converted / copies", "kept MB: plain", "copies", "converted"]]
    for case in cases:
        first, median, third = case["ratio"]["converted"]
        rows.append(
            [
                case["task"],
                str(case["batch"]),
                str(case["size"]),
                *(f"{ms[1]:.1f}" for ms in case["ms"].values()),
                f"{median:.3f} ({first:.3f} to {third:.3f})",
                *(f"{saved / 1e6:.1f}" for saved in case["saved"].values()),
            ]
        )
    return table(rows, "<" + ">" * 9)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.convert", description=__doc__)
    add_timing_options(parser, 20.0, "each case", "convert.json")
    options = parser.parse_args()
    require_packages(parser, "timm", "timm", "torchvision")
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_memory()
    cases = list(measure(options.seconds))
    write_results(options.json, machine_info(seconds=options.seconds, memory_kept=kept), cases)
    print(summary(cases))


if __name__ == "__main__":
    main()
