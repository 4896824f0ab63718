"""Time whole models on a CPU: plain, with the authors' formula, and with simam.

Under torch.compile also "reference": simam as plain torch operations, for the compiler to fuse.
"""

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import simam
from simam import reference

from .op import formula
from .options import add_timing_options, require_packages
from .timing import (
    Call,
    interleave,
    keep_memory,
    machine_info,
    quartiles,
    write_results,
)

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
TASKS = (("inference", 1), ("inference", 8), ("training", 8))
E_LAMBDA = 0.1


class Formula(nn.Module):
    """The authors' formula as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return formula(x, E_LAMBDA)


class Reference(nn.Module):
    """The reference implementation, which simam runs where no kernel is available."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.forward(x, E_LAMBDA, "shared")


def variants(plain: nn.Module, *, compiled: bool = False) -> dict[str, nn.Module]:
    """The model, plain and with each form of SimAM: the same weights, each its own statistics."""
    models = {"plain": plain, "formula": copy_with(plain, Formula()), "simam": copy_with(plain)}
    if compiled:
        models["reference"] = copy_with(plain, Reference())
    for model in models.values():
        estimate_statistics(model)
    if not compiled:
        return models
    return {
        key: cast(nn.Module, torch.compile(model, dynamic=False)) for key, model in models.items()
    }


def copy_with(plain: nn.Module, layer: nn.Module | None = None) -> nn.Module:
    """Copy a model and attach SimAM; a given layer replaces every SimAM of the copy.

    The layer is not inserted by hooks: torch.compile ignores them when it looks up whether a model
    is already compiled.
    """
    model = simam.attach(copy.deepcopy(plain), e_lambda=E_LAMBDA)
    if layer is not None:
        for insertion in simam.plan(plain):
            model.get_submodule(insertion.path).simam = layer
    return model


def estimate_statistics(model: nn.Module) -> None:
    """Set the batch-norm statistics to those of a random batch.

    With random weights and the initial statistics, values shrink from layer to layer until they
    are denormal, which is slow.
    """
    torch.manual_seed(1)
    simam.recalibrate(model, [torch.randn(2, 3, 224, 224)])


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Run forward without gradients."""
    with torch.no_grad():
        return cast(Tensor, model(x))


def train(model: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """Run forward and backward, without an optimizer."""
    model.zero_grad()
    (model(x) * grad_output).sum().backward()


def measure(name: str, mode: str, layout: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure the cases of one model, one for each of `TASKS`.

    Yields:
        dict: model, mode, layout, task, batch, and rounds; under "ms" the quartiles of the
            milliseconds by variant; under "ratio" the quartiles of the time divided, round by
            round, by the time of the plain model.
    """
    from torchvision.models import get_model

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for task, batch in TASKS:
        torch._dynamo.reset()
        torch.manual_seed(0)
        plain = get_model(name, weights=None).to(memory_format=memory_format)
        models = variants(plain, compiled=mode == "compiled")
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=memory_format)
        calls: dict[str, Call]
        if task == "inference":
            check({key: infer(model.eval(), x) for key, model in models.items()})
            calls = {key: partial(infer, m, x) for key, m in models.items()}
        else:
            grad_output = torch.randn(batch, 1000)
            calls = {key: partial(train, m.train(), x, grad_output) for key, m in models.items()}
        times = interleave(calls, seconds, warm=False)
        plain = times["plain"]
        ratios = {k: [t / p for t, p in zip(v, plain, strict=True)] for k, v in times.items()}
        yield {
            "model": name,
            "mode": mode,
            "layout": layout,
            "task": task,
            "batch": batch,
            "rounds": len(plain),
            "ms": {key: quartiles([1e3 * t for t in each]) for key, each in times.items()},
            "ratio": {key: quartiles(each) for key, each in ratios.items() if key != "plain"},
        }


def check(outputs: dict[str, Tensor]) -> None:
    """Refuse to time models whose outputs contradict their names."""
    for name, output in outputs.items():
        gap = ((output - outputs["simam"]).norm() / output.norm()).item()
        if (gap > 1e-3) != (name == "plain"):
            raise RuntimeError(f"the output of {name} differs from that of simam by {gap:.1e}")


def print_case(case: dict[str, Any]) -> None:
    """Print one case in one line."""
    title = f"{case['model']} {case['mode']} {case['layout']} {case['task']} {case['batch']}"
    line = f"{title:50} plain {case['ms']['plain'][1]:7.1f} ms"
    for name, (first, median, third) in case["ratio"].items():
        line += f"   {name} x {median:.3f} ({first:.3f} to {third:.3f})"
    print(line, flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.models", description=__doc__)
    add_timing_options(parser, 20.0, "each line of output", "models.json")
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="NAME",
        help=f"names of torchvision; default: {', '.join(MODELS)}",
    )
    parser.add_argument("--compiled", action="store_true", help="also time under torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="also time in channels_last")
    options = parser.parse_args()
    require_packages(parser, "timm", "timm", "torchvision")
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_memory()

    info = machine_info(seconds=options.seconds, memory_kept=kept)
    cases: list[dict[str, Any]] = []
    for name in options.models:
        for mode in ("eager", "compiled")[: 1 + options.compiled]:
            for layout in ("contiguous", "channels_last")[: 1 + options.channels_last]:
                for case in measure(name, mode, layout, options.seconds):
                    cases.append(case)
                    print_case(case)
                    write_results(options.json, info, cases)


if __name__ == "__main__":
    main()
