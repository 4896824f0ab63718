"""Compare attention layers: the same seeds, images in the same order, the same schedule.

Run from the root of a checkout. All other options are those of benchmarks.accuracy.train, and apply
to every run:

    python -m benchmarks.accuracy.compare --seeds 5 --output runs/digits --dataset digits

Complete runs are not repeated and interrupted ones are resumed, so a later call with a larger
--seeds only adds the missing runs. Each run is a command of its own, which results.json lists.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.accuracy.classification.options import ATTENTION, parse
from benchmarks.accuracy.common.checkpoint import load, write_json
from benchmarks.accuracy.common.log import png_figure
from benchmarks.accuracy.common.options import require_extra
from benchmarks.speed.timing import facts
from simam.messages import UserError

PROG = "python -m benchmarks.accuracy.compare"
TRAIN = "benchmarks.accuracy.train"
ROOT = Path(__file__).parents[2]  # of the checkout, from which `benchmarks` is imported

# Options of benchmarks.accuracy.train that this script sets itself, and what to do instead.
RESERVED_OPTIONS = {
    "--attention": "every attention layer is trained; choose some with --only",
    "--seed": "seeds are counted from 0; choose their number with --seeds",
    "--evaluate": "this script trains",
}


def main() -> None:
    """Run the missing trainings, measure a training step, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each attention layer; default: 3"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ATTENTION,
        metavar="ATTENTION",
        help=f"attention layers to compare, the baseline first; default: {' '.join(ATTENTION)}",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long to time training steps; default: 60"
    )
    options, train_arguments = parser.parse_known_args()
    for name, reason in RESERVED_OPTIONS.items():
        if any(argument.partition("=")[0] == name for argument in train_arguments):
            parser.error(f"{name}: expected none, {reason}")
    train_options = parse(train_arguments)
    try:
        compare(options, train_options, train_arguments)
    except UserError as error:
        parser.error(str(error))


def compare(
    options: argparse.Namespace, train_options: argparse.Namespace, train_arguments: list[str]
) -> None:
    """Train, measure, print and write.

    Args:
        options (Namespace): options of this script.
        train_options (Namespace): options of every run.
        train_arguments (list of str): the same as words of the command line.

    Raises:
        UserError: a run failed, or a package is missing.
    """
    with require_extra("train"):
        from benchmarks.accuracy.classification.step_cost import measure
    names = tuple(options.only or ATTENTION)
    runs = train_all(names, options.seeds, options.jobs, options.output, train_arguments)
    costs = measure(names, train_options, options.seconds)
    conditions = describe(train_options, train_arguments, options.seeds)
    cases = summarize(runs, costs)
    write_json(conditions | {"cases": cases}, options.output / "results.json")
    plot(cases, options.output / "results.png")
    print(markdown_table(cases))


def train_all(
    names: Sequence[str], seeds: int, jobs: int, folder: Path, arguments: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Train every attention layer with every seed.

    Args:
        names (sequence of str): attention layers.
        seeds (int): number of seeds.
        jobs (int): runs at the same time.
        folder (Path): for the folders and outputs of the runs.
        arguments (list of str): arguments of benchmarks.accuracy.train for every run.

    Returns:
        dict of list of dict: by attention and in the order of the seeds, the results of `train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(product(range(seeds), names))  # completes a seed before starting the next
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, name, seed, folder, arguments) for seed, name in cases]
        results = [future.result() for future in futures]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for (_, name), result in zip(cases, results, strict=True):
        runs[name].append(result)
    return runs


def train(name: str, seed: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Start or resume one training in a process of its own; return its command and log rows."""
    output = folder / f"{name}-{seed}"
    arguments = ["-m", TRAIN, *arguments, "--attention", name, "--seed", str(seed)]
    command = shlex.join(["python", *arguments])
    inherited = os.environ.get("PYTHONPATH")
    search_path = f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
    with open(folder / f"{name}-{seed}.txt", "a") as out:
        process = subprocess.run(
            [sys.executable, *arguments, "--output", str(output), "--resume"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": search_path},
        )
    if process.returncode:
        raise UserError(f"a run failed, see {out.name}: {command}")
    rows = load(output / "last.pth")["rows"]
    print(f"{name:16} seed {seed}   top-1 {rows[-1]['top1']:6.2f} %", flush=True)
    return {"command": command, "rows": rows}


def summarize(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], costs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, and the change from the first attention.

    The change is the mean of the differences between runs of the same seed.

    Args:
        runs (dict of list of dict): by attention, results of `train`.
        costs (dict of dict): by attention, results of `step_cost.measure`.
    """
    top1 = {name: [run["rows"][-1]["top1"] for run in each] for name, each in runs.items()}
    baseline = next(iter(top1.values()))
    cases = []
    for name, values in top1.items():
        changes = [value - base for value, base in zip(values, baseline, strict=True)]
        curves = [[row["top1"] for row in run["rows"]] for run in runs[name]]
        cases.append(
            {
                "attention": name,
                "top1": mean(values),
                "top1_std": _std(values),
                "change": mean(changes),
                "change_error": _std(changes) / math.sqrt(len(changes)),
                **costs[name],
                "top1_of_seeds": values,
                "commands": [run["command"] for run in runs[name]],
                "curve": [mean(epoch) for epoch in zip(*curves, strict=True)],
            }
        )
    return cases


def _std(values: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN for a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def describe(
    train_options: argparse.Namespace, train_arguments: list[str], seeds: int
) -> dict[str, Any]:
    """The conditions of the comparison: machine, versions, date and arguments."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return facts(
        date=date.today().isoformat(),
        device=train_options.device or device,
        cores=os.cpu_count(),
        seeds=seeds,
        arguments=shlex.join(train_arguments),
    )


def markdown_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| attention | top-1, % | change | parameters | time of a step | kept for backward |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        first, third = case["step_ratio_quartiles"]
        lines.append(
            f"| {case['attention']} | {case['top1']:.2f} ± {case['top1_std']:.2f} "
            f"| {case['change']:+.2f} ± {case['change_error']:.2f} "
            f"| {case['parameters']:,} "
            f"| {case['step_ratio']:.2f} ({first:.2f} to {third:.2f}) "
            f"| {case['kept_mb']:.1f} MB |"
        )
    return "\n".join(lines)


def plot(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the accuracy of every seed beside the time of a training step."""
    with png_figure(path, 10, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        names = [case["attention"] for case in cases]
        for x, case in enumerate(cases):
            values = case["top1_of_seeds"]
            left.plot([x] * len(values), values, ".", color="C0", alpha=0.5)
            left.errorbar(x, case["top1"], case["top1_std"], fmt="_", color="C1", capsize=4)
        left.set(ylabel="top-1 accuracy, %", title="each seed; mean and standard deviation")
        right.bar(names, [case["step_ratio"] for case in cases], color="C0")
        right.axhline(1, color="black", linewidth=0.8)
        right.set(ylabel=f"time relative to {names[0]}", title="time of a training step")
        for axes in (left, right):
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    main()
