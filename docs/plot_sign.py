"""Draw docs/images/sign.svg: the energy over w, with the paper's w and the right one."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

OTHERS = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
TARGET = 2.0
E_LAMBDA = 1e-4


def energy(w: torch.Tensor) -> torch.Tensor:
    """The definition, with the best b for each w."""
    b = -(TARGET + OTHERS.mean()) * w / 2
    others = (-1 - (w[:, None] * OTHERS + b[:, None])).square().mean(1)
    return others + (1 - (w * TARGET + b)).square() + E_LAMBDA * w.square()


def main() -> None:
    """Draw."""
    shift = TARGET - OTHERS.mean()
    scale = 2 * (OTHERS.var(correction=0) + E_LAMBDA)
    right = (2 * shift / (shift.square() + scale)).reshape(1)
    minimum = 2 * scale / (shift.square() + scale)
    w = torch.linspace(-1.4, 2.2, 200, dtype=torch.float64)

    plt.rcParams.update({"svg.hashsalt": "simam", "font.size": 10, "axes.titlesize": 11})
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(w, energy(w), color="#0072b2")
    axis.axhline(minimum.item(), color="0.6", linestyle=":", zorder=0)
    axis.plot(right, energy(right), "o", color="#0072b2")
    axis.plot(-right, energy(-right), "X", color="#d55e00", markersize=8)
    axis.annotate(
        f"w as derived here:\ne = {energy(right).item():.2f}, the minimum e*",
        (right.item(), energy(right).item()),
        (right.item(), 4.5),
        ha="center",
        arrowprops={"arrowstyle": "-", "color": "0.6", "shrinkB": 5},
    )
    axis.annotate(
        f"w as printed in the paper:\ne = {energy(-right).item():.2f}",
        (-right.item(), energy(-right).item()),
        (12, 4),
        textcoords="offset points",
    )
    axis.set(xlabel="w", ylabel="energy, at the best b for w", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "images" / "sign.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
