"""Compare attention layers fairly: the same seeds, images in the same order, the same schedule.

What follows the options of this script goes to train.py, for every run:

    python benchmarks/compare.py --seeds 5 --output runs/digits --dataset digits --epochs 15

Runs that are finished are not run again, and one that was broken off goes on, so more seeds may be
asked for later. Each run is a command of its own, which the JSON lists.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.classification import datasets, networks
from benchmarks.accuracy.classification.recipes import RECIPES, optimizer
from benchmarks.accuracy.classification.trainer import place
from benchmarks.accuracy.common.checkpoint import load, write_json
from benchmarks.accuracy.common.log import png_figure
from benchmarks.accuracy.common.trainer import autocast
from benchmarks.accuracy.train import parse
from benchmarks.speed.timing import facts, interleave, quartiles
from simam.messages import UserError

# Options of train.py that are not the user's to give here.
RESERVED_OPTIONS = {
    "--attention": "every attention is trained; choose some by --only",
    "--seed": "seeds are counted from 0; choose how many by --seeds",
    "--evaluate": "this script trains",
}


def main() -> None:
    """Run what is missing, measure a step of each, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default: 3")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    parser.add_argument("--only", nargs="+", choices=networks.ATTENTION, metavar="ATTENTION")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--seconds", type=float, default=60.0, help="to time steps for")
    options, rest = parser.parse_known_args()
    for name, instead in RESERVED_OPTIONS.items():
        if any(argument.partition("=")[0] == name for argument in rest):
            parser.error(f"{name}: expected none, {instead}")
    names = tuple(options.only or networks.ATTENTION)
    try:
        training = parse(rest)
        runs = train_all(names, options.seeds, options.jobs, options.output, rest)
        result = about(training, rest, options) | {
            "cases": summarize(runs, measure(names, training, options.seconds))
        }
    except UserError as error:
        parser.error(str(error))
    write_json(result, options.output / "results.json")
    draw(result["cases"], options.output / "results.png")
    print(table(result["cases"]))


def train_all(
    names: tuple[str, ...], seeds: int, jobs: int, folder: Path, rest: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """The log of every run, by attention, in the order of the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(product(range(seeds), names))  # a seed is complete before the next one starts
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(train, name, seed, folder, rest) for seed, name in cases]
        logs = [job.result() for job in waiting]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for (seed, name), log in zip(cases, logs, strict=True):
        found[name].append({"seed": seed} | log)
    return found


def train(name: str, seed: int, folder: Path, rest: list[str]) -> dict[str, Any]:
    """Run one training, or what is left of it; its command and its rows."""
    output = folder / f"{name}-{seed}"
    arguments = [*rest, "--attention", name, "--seed", str(seed)]
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *arguments]
    with open(folder / f"{name}-{seed}.txt", "a") as out:
        done = subprocess.run(
            [*command, "--output", str(output), "--resume"], stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise UserError(f"a run failed, see {out.name}: {shlex.join(command)}")
    rows = load(output / "last.pth")["rows"]
    last = rows[-1]
    print(f"{name:16} seed {seed}   top-1 {last['top1']:6.2f} %", flush=True)
    return {"command": shlex.join(["train.py", *arguments]), "rows": rows}


def measure(
    names: tuple[str, ...], options: argparse.Namespace, seconds: float
) -> dict[str, dict[str, Any]]:
    """Parameters, memory and time of a training step of each, timed in turns."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = RECIPES[options.recipe]
    data = datasets.load(options.dataset, options.data, recipe, options.input_size)
    items = [data.train[index] for index in range(options.batch_size)]
    batch = place(
        torch.stack([image for image, _ in items]),
        torch.tensor([label for _, label in items]),
        device,
        options.channels_last,
    )
    found, steps = {}, {}
    for name in names:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model = networks.build(options.model, len(data.classes), name, options.e_lambda)
        model = model.to(device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        sgd = optimizer(model, options.lr, options.weight_decay, options.momentum)
        steps[name] = partial(step, model, sgd, batch, options.amp)
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "kept_mb": kept(model, steps[name]) / 1e6,
        }
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
            found[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    times = interleave(steps, seconds)
    for name in names:
        ratios = [mine / base for mine, base in zip(times[name], times[names[0]], strict=True)]
        low, middle, high = quartiles(ratios)
        found[name] |= {
            "step_ms": 1e3 * median(times[name]),
            "step_ratio": middle,
            "step_ratio_quartiles": [low, high],
        }
    return found


def step(
    model: nn.Module, sgd: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], amp: str
) -> None:
    """A step of training."""
    images, labels = batch
    with autocast(images.device, amp):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    sgd.step()
    sgd.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


def kept(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes that the forward pass keeps for backward, without parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def summarize(
    runs: Mapping[str, list[dict[str, Any]]], steps: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Mean and deviation over the seeds, and the change against the first, seed by seed."""
    found = []
    base = [run["rows"][-1]["top1"] for run in next(iter(runs.values()))]
    for name, its in runs.items():
        top1 = [run["rows"][-1]["top1"] for run in its]
        changes = [mine - other for mine, other in zip(top1, base, strict=True)]
        found.append(
            {
                "attention": name,
                "top1": mean(top1),
                "top1_std": spread(top1),
                "change": mean(changes),
                "change_error": spread(changes) / math.sqrt(len(changes)),
                **steps[name],
                "top1_of_seeds": top1,
                "commands": [run["command"] for run in its],
                "curve": [mean(column) for column in zip(*map(_top1, its), strict=True)],
            }
        )
    return found


def _top1(run: Mapping[str, Any]) -> list[float]:
    return [row["top1"] for row in run["rows"]]


def spread(values: list[float]) -> float:
    """Standard deviation of a sample; of a single value there is none."""
    return stdev(values) if len(values) > 1 else math.nan


def about(
    training: argparse.Namespace, rest: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return facts(
        date=date.today().isoformat(),
        device=training.device or device,
        cores=os.cpu_count(),
        seeds=options.seeds,
        arguments=shlex.join(rest),
    )


def table(cases: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| attention | top-1, % | change | parameters | time of a step | kept for backward |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        low, high = case["step_ratio_quartiles"]
        lines.append(
            f"| {case['attention']} | {case['top1']:.2f} ± {case['top1_std']:.2f} "
            f"| {case['change']:+.2f} ± {case['change_error']:.2f} "
            f"| {case['parameters']:,} "
            f"| {case['step_ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {case['kept_mb']:.1f} MB |"
        )
    return "\n".join(lines)


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every seed beside the time of a step."""
    with png_figure(path, 10, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        names = [case["attention"] for case in cases]
        for place, case in enumerate(cases):
            values = case["top1_of_seeds"]
            left.plot([place] * len(values), values, ".", color="C0", alpha=0.5)
            left.errorbar(place, case["top1"], case["top1_std"], fmt="_", color="C1", capsize=4)
        left.set(ylabel="top-1 accuracy, %", title="each seed; mean and standard deviation")
        right.bar(names, [case["step_ratio"] for case in cases], color="C0")
        right.axhline(1, color="black", linewidth=0.8)
        right.set(ylabel=f"time by that of {names[0]}", title="time of a training step")
        for axes in (left, right):
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    main()
