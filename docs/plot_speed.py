"""Draw docs/images/speed.svg and print the tables of docs/performance.md, from the benchmarks."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/speed/results"
PASSES = ("forward", "forward+backward")
TIMM = ("se", "ese", "eca", "gc", "cbam", "coord", "ela", "strip")
FASTEST = "fastest timm layer"

# name, colour, marker
SERIES = (
    ("formula", "#d55e00", "s"),
    ("formula compiled", "#e69f00", "D"),
    (FASTEST, "#009e73", "^"),
    ("sigmoid", "#56b4e9", "v"),
    ("simam", "#0072b2", "o"),
)
OTHERS = ("copy", "sigmoid", "formula", "formula compiled")


def timm(times: dict[str, float]) -> list[tuple[float, str]]:
    """Times and names of timm's layers, the fastest first; none where a map is not 2-D."""
    return sorted((times[name], name) for name in TIMM if name in times)


def points(cases: Iterable[dict[str, Any]], kind: str, name: str) -> list[tuple[float, float]]:
    """Megabytes and milliseconds of one series."""
    found = []
    for case in cases:
        times = case[kind]
        if name in times:
            found.append((case["bytes"] / 1e6, times[name] / 1e3))
        elif layers := timm(times):
            found.append((case["bytes"] / 1e6, layers[0][0] / 1e3))
    return sorted(found)


def middle(found: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """One point for each size, which shapes may share."""
    sizes = sorted({size for size, _ in found})
    return sizes, [geometric_mean(t for size, t in found if size == each) for each in sizes]


def draw(cases: list[dict[str, Any]], target: Path) -> None:
    """Time against size, of contiguous tensors."""
    cases = [case for case in cases if case["layout"] == "contiguous"]
    plt.rcParams.update({"svg.hashsalt": "simam", "font.size": 10, "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    for axis, kind in zip(axes, PASSES, strict=True):
        axis.plot(*middle(points(cases, kind, "copy")), color="0.6", label="copy")
        for name, color, marker in SERIES:
            found = points(cases, kind, name)
            axis.plot(*zip(*found, strict=True), marker, color=color, markersize=5, label=name)
            axis.plot(*middle(found), color=color, linewidth=1)
        axis.set_title(f"{kind}, milliseconds", loc="left")
        axis.set(xscale="log", yscale="log", xlabel="x in MB, float32")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def short(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):g}"


def op_rows(cases: Iterable[dict[str, Any]], kind: str) -> Iterator[list[str]]:
    """Times of simam, by those of each other."""
    for case in cases:
        times = case[kind]
        ours = times["simam"]
        layers = timm(times)
        yield [
            case["shape"],
            case["layout"],
            short(ours / 1e3),
            *(f"{ours / times[name]:.2f}" for name in OTHERS),
            *(f"{ours / time:.2f} ({name})" for time, name in (layers[:1] + layers[-1:])),
            *["-"] * (0 if layers else 2),
        ]


def model_rows(cases: Iterable[dict[str, Any]], names: Iterable[str]) -> Iterator[list[str]]:
    """Times of the plain model, and what each SimAM multiplies them by."""
    for case in cases:
        spreads = [case["ratio"].get(name) for name in names]
        yield [
            case["model"],
            f"{case['task']}, batch {case['batch']}",
            case["mode"],
            case["layout"],
            short(case["ms"]["plain"][1]),
            *("-" if s is None else f"{s[1]:.2f} ({s[0]:.2f} to {s[2]:.2f})" for s in spreads),
        ]


def main() -> None:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", type=Path, default=RESULTS / "op.json")
    parser.add_argument("--models", type=Path, default=RESULTS / "models.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs/images/speed.svg")
    options = parser.parse_args()
    op, models = (json.loads(path.read_text()) for path in (options.op, options.models))

    draw(op["cases"], options.svg)
    head = ["shape", "layout", "ms", *(f"/ {name}" for name in OTHERS)]
    head += [f"/ {FASTEST}", "/ slowest timm layer"]
    for kind in PASSES:
        print(f"simam, {kind}, {op['processor']}, threads: {op['threads']}\n")
        print(*table(head, op_rows(op["cases"], kind)), sep="\n")
    names = ("formula", "simam", "composite")
    head = ["model", "task", "mode", "layout", "plain, ms", *(f"{name} / plain" for name in names)]
    print(f"models, {models['processor']}, threads: {models['threads']}\n")
    print(*table(head, model_rows(models["cases"], names)), sep="\n")


if __name__ == "__main__":
    main()
