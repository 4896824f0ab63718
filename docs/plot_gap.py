"""Draw docs/images/gap.svg and print its data: the error of shared statistics."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from simam.functional import energy

SIDES = (2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 56)
MAPS = 10_000
E_LAMBDA = 1e-4
SHARED, BOUND = "#0072b2", "#d55e00"


def measure(side: int) -> tuple[float, float, float, float]:
    """Measure shared against leave-one-out statistics on random square maps.

    Returns:
        tuple of float: worst and mean relative gap of 1/e*, worst and mean absolute gap of the
            gate.
    """
    torch.manual_seed(0)
    worst, mean = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    for _ in range(10):
        maps = torch.randn(1, MAPS // 10, side, side, dtype=torch.float64)
        shared = energy(maps, E_LAMBDA).reciprocal()
        exact = energy(maps, E_LAMBDA, statistics="leave_one_out").reciprocal()
        gaps = torch.stack([1 - shared / exact, exact.sigmoid() - shared.sigmoid()])
        worst = torch.maximum(worst, gaps.flatten(1).amax(1))
        mean += gaps.flatten(1).mean(1) / 10
    return (worst[0].item(), mean[0].item(), worst[1].item(), mean[1].item())


def largest_gate_gap(side: int) -> float:
    """The largest absolute gap of the gate on any map of this side.

    The exact 1/e* is a function of the shared 1/e* (docs/theory.md), so it suffices to search all
    values of the latter.
    """
    m = side * side
    u = torch.linspace(0, (m - 1) ** 2 / (4 * m), 1_000_001, dtype=torch.float64)[:-1]
    exact = m * m * u / ((m - 1) ** 2 - 4 * m * u)
    return ((exact + 0.5).sigmoid() - (u + 0.5).sigmoid()).max().item()


def main() -> None:
    """Measure, print and draw."""
    rows = [(*measure(side), largest_gate_gap(side)) for side in SIDES]
    print("side  1/e*: worst, mean   gate: worst, mean, largest possible")
    for side, row in zip(SIDES, rows, strict=True):
        print(f"{side:4d}  {row[0]:.4f}  {row[1]:.5f}     {row[2]:.4f}  {row[3]:.5f}  {row[4]:.4f}")

    plt.rcParams.update({"svg.hashsalt": "simam", "font.size": 10, "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    worst_energy, mean_energy, worst_gate, mean_gate, bound = zip(*rows, strict=True)
    axes[0].set_title("1/e*: relative gap to the exact value", loc="left")
    axes[1].set_title("gate: absolute gap to the exact value", loc="left")
    axes[1].plot(SIDES, bound, color=BOUND, label="largest possible on any map")
    for axis, worst, mean in zip(
        axes, (worst_energy, worst_gate), (mean_energy, mean_gate), strict=True
    ):
        axis.plot(SIDES, worst, "o", color=SHARED, label=f"worst neuron of {MAPS:,} maps")
        axis.plot(
            SIDES, mean, "o:", color=SHARED, markerfacecolor="white", label="mean over neurons"
        )
        axis.set(xscale="log", yscale="log", xlabel="side of the map", ylim=(1e-5, 2))
        axis.set_xticks((2, 3, 4, 5, 7, 10, 14, 28, 56), (2, 3, 4, 5, 7, 10, 14, 28, 56))
        axis.minorticks_off()
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    target = Path(__file__).parent / "images" / "gap.svg"
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
