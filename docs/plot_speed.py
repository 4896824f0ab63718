"""Draw docs/images/speed.svg and print the tables of docs/performance.md from benchmark results."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

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
VARIANTS = ("formula", "simam", "reference")


def timm_times(times: dict[str, float]) -> list[tuple[float, str]]:
    """Times and names of timm's layers, fastest first; empty if the map is not 2-D."""
    return sorted((times[name], name) for name in TIMM if name in times)


def sizes_and_times(
    cases: Iterable[dict[str, Any]], kind: str, name: str
) -> list[tuple[float, float]]:
    """Megabytes and milliseconds of one series, for every case that has it."""
    result = []
    for case in cases:
        times = case[kind]
        if name in times:
            result.append((case["bytes"] / 1e6, times[name] / 1e3))
        elif name == FASTEST and (layers := timm_times(times)):
            result.append((case["bytes"] / 1e6, layers[0][0] / 1e3))
    return sorted(result)


def mean_times(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Each size once, with the geometric mean of the times of all shapes of that size."""
    sizes = sorted({size for size, _ in points})
    return sizes, [geometric_mean(t for size, t in points if size == each) for each in sizes]


def draw(cases: list[dict[str, Any]], target: Path) -> None:
    """Plot time against size, for contiguous tensors."""
    import matplotlib.pyplot as plt

    cases = [case for case in cases if case["layout"] == "contiguous"]
    plt.rcParams.update({"svg.hashsalt": "simam", "font.size": 10, "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    for axis, kind in zip(axes, PASSES, strict=True):
        axis.plot(*mean_times(sizes_and_times(cases, kind, "copy")), color="0.6", label="copy")
        for name, color, marker in SERIES:
            points = sizes_and_times(cases, kind, name)
            axis.plot(*zip(*points, strict=True), marker, color=color, markersize=5, label=name)
            axis.plot(*mean_times(points), color=color, linewidth=1)
        axis.set_title(f"{kind}, milliseconds", loc="left")
        axis.set(xscale="log", yscale="log", xlabel="x in MB, float32")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines of a table in Markdown, then an empty line."""
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def three_digits(value: float) -> str:
    """Round to three significant digits."""
    return f"{float(f'{value:.3g}'):g}"


def op_rows(cases: Iterable[dict[str, Any]], kind: str) -> Iterator[list[str]]:
    """For each case the time of simam, and its ratio to every other time."""
    for case in cases:
        times = case[kind]
        ours = times["simam"]
        layers = timm_times(times)
        yield [
            case["shape"],
            case["layout"],
            three_digits(ours / 1e3),
            *(f"{ours / times[name]:.2f}" for name in OTHERS),
            *(f"{ours / time:.2f} ({name})" for time, name in (layers[:1] + layers[-1:])),
            *["-"] * (0 if layers else 2),
        ]


def model_rows(cases: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """For each case the time of the plain model, and the ratio of every variant to it."""
    for case in cases:
        ratios = [case["ratio"].get(name) for name in VARIANTS]
        yield [
            case["model"],
            f"{case['task']}, batch {case['batch']}",
            case["mode"],
            case["layout"],
            three_digits(case["ms"]["plain"][1]),
            *("-" if r is None else f"{r[1]:.2f} ({r[0]:.2f} to {r[2]:.2f})" for r in ratios),
        ]


def main() -> None:
    """Read the results, draw the plot and print the tables."""
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
        print(*markdown_table(head, op_rows(op["cases"], kind)), sep="\n")
    head = ["model", "task", "mode", "layout", "plain, ms"]
    head += [f"{name} / plain" for name in VARIANTS]
    print(f"models, {models['processor']}, threads: {models['threads']}\n")
    print(*markdown_table(head, model_rows(models["cases"])), sep="\n")


if __name__ == "__main__":
    main()
