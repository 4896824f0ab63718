"""Time whole models: plain, with the authors' formula, with simam.

Under torch.compile there is also "composite": simam as plain operations, for the compiler to fuse.
"""

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import simam
from benchmarks.speed.op import formula
from benchmarks.speed.timing import facts, interleave, keep_memory, quartiles, write
from simam import reference

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
TASKS = (("inference", 1), ("inference", 8), ("training", 8))
E_LAMBDA = 0.1


class Formula(nn.Module):
    """The authors' formula as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return formula(x, E_LAMBDA)


class Composite(nn.Module):
    """What simam runs where no kernel serves."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.forward(x, E_LAMBDA, "shared")


def variants(name: str, compiled: bool, layout: str) -> dict[str, nn.Module]:
    """The model, plain and with each SimAM, all with the same weights."""
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None)
    if layout == "channels_last":
        plain = plain.to(memory_format=torch.channels_last)
    found = {"plain": plain, "formula": attached(plain, Formula()), "simam": attached(plain)}
    if compiled:
        found["composite"] = attached(plain, Composite())
    for model in found.values():
        settle(model)
    if compiled:
        return {key: torch.compile(model, dynamic=False) for key, model in found.items()}
    return found


def attached(plain: nn.Module, layer: nn.Module | None = None) -> nn.Module:
    """A copy with SimAM, or with another layer in each of its places.

    Not by hooks: the compiler does not look at them when it asks whether a model is one that it
    has compiled.
    """
    model = simam.attach(copy.deepcopy(plain), e_lambda=E_LAMBDA)
    if layer is not None:
        for insertion in simam.plan(plain):
            model.get_submodule(insertion.path).simam = layer
    return model


def settle(model: nn.Module) -> None:
    """Give batch norms the statistics of this model, as training would.

    Else, with random weights, values shrink from layer to layer until they are denormal.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    torch.manual_seed(1)
    x = torch.randn(2, 3, 224, 224).to(norms[0].weight.device)
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Forward, without gradients."""
    with torch.no_grad():
        return model(x)


def train(model: nn.Module, x: Tensor, cotangent: Tensor) -> None:
    """Forward and backward, with fresh gradients and no optimiser."""
    model.zero_grad()
    (model(x) * cotangent).sum().backward()


def measure(name: str, mode: str, layout: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The cases of one model: milliseconds, and their ratio to the plain model round by round."""
    for task, batch in TASKS:
        torch._dynamo.reset()
        models = variants(name, mode == "compiled", layout)
        x = torch.randn(batch, 3, 224, 224)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        call = infer if task == "inference" else partial(train, cotangent=torch.randn(batch, 1000))
        calls = {key: partial(call, m.train(task == "training"), x) for key, m in models.items()}
        if task == "inference":
            check({key: run() for key, run in calls.items()})
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
    """Refuse to time models that do not compute what their names say."""
    for name, output in outputs.items():
        gap = ((output - outputs["simam"]).norm() / output.norm()).item()
        if (gap > 1e-3) != (name == "plain"):
            raise RuntimeError(f"the output of {name} differs from that of simam by {gap:.1e}")


def show(case: dict[str, Any]) -> None:
    """Print one case in one line."""
    title = f"{case['model']} {case['mode']} {case['layout']} {case['task']} {case['batch']}"
    line = f"{title:50} plain {case['ms']['plain'][1]:7.1f} ms"
    for name, (first, median, third) in case["ratio"].items():
        line += f"   {name} x {median:.3f} ({first:.3f} to {third:.3f})"
    print(line, flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="in channels_last too")
    parser.add_argument("--json", type=Path, default=RESULTS / "models.json")
    parser.add_argument(
        "--keep-memory", action="store_true", help="without page faults: see timing.keep_memory"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_memory()

    machine, cases = facts(seconds=options.seconds, memory_kept=kept), []
    for name in options.models:
        for mode in ("eager", "compiled")[: 1 + options.compiled]:
            for layout in ("contiguous", "channels_last")[: 1 + options.channels_last]:
                for case in measure(name, mode, layout, options.seconds):
                    cases.append(case)
                    show(case)
                    write(options.json, machine, cases)


if __name__ == "__main__":
    main()
