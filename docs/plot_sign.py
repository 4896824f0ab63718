"""Draw docs/images/sign.svg: the energy as a function of w, at the paper's w and the correct w."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

OTHERS = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
TARGET = 2.0
E_LAMBDA = 1e-4


def energy(w: torch.Tensor) -> torch.Tensor:
    """The energy by its definition in the paper, with the best b for each w."""
    b = -(TARGET + OTHERS.mean()) * w / 2
    error_others = (-1 - (w[:, None] * OTHERS + b[:, None])).square().mean(1)
    error_target = (1 - (w * TARGET + b)).square()
    return error_others + error_target + E_LAMBDA * w.square()


def main() -> None:
    """Compute the two values of w and draw the plot."""
    # The names and formulas of docs/theory.md.
    delta = TARGET - OTHERS.mean()
    variance = OTHERS.var(correction=0)
    denominator = delta.square() + 2 * (variance + E_LAMBDA)
    derived = (2 * delta / denominator).reshape(1)
    minimum = 4 * (variance + E_LAMBDA) / denominator
    w = torch.linspace(-1.4, 2.2, 200, dtype=torch.float64)

    plt.rcParams.update({"svg.hashsalt": "simam", "font.size": 10, "axes.titlesize": 11})
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(w, energy(w), color="#0072b2")
    axis.axhline(minimum.item(), color="0.6", linestyle=":", zorder=0)
    axis.plot(derived, energy(derived), "o", color="#0072b2")
    axis.plot(-derived, energy(-derived), "X", color="#d55e00", markersize=8)
    axis.annotate(
        f"w as derived here:\ne = {energy(derived).item():.2f}, the minimum e*",
        (derived.item(), energy(derived).item()),
        (derived.item(), 4.5),
        ha="center",
        arrowprops={"arrowstyle": "-", "color": "0.6", "shrinkB": 5},
    )
    axis.annotate(
        f"w as printed in the paper:\ne = {energy(-derived).item():.2f}",
        (-derived.item(), energy(-derived).item()),
        (12, 4),
        textcoords="offset points",
    )
    axis.set(xlabel="w", ylabel="energy, at the best b for w", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "images" / "sign.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
