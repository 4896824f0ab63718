"""Figures of attention maps: images, the maps laid over them, and histograms of the gates."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages import UserError, format_shape, one_line
from .maps import Layer
from .models import import_optional

_PANEL, _GAP = 1.7, 0.15  # inches
_INK, _BAR = "#222222", "#4c78a8"
_HISTOGRAM = "share of neurons,\ndotted: bounds"
_LABEL = {"color": _INK, "fontsize": 10, "parse_math": False}
_TITLE = {"color": _INK, "fontsize": 11, "parse_math": False, "va": "top"}


def check_output(output: str, images: Sequence[str]) -> None:
    """Refuse, before any work, an output file that the figure cannot or must not be written to.

    Raises:
        UserError: matplotlib is missing or does not know the format, the folder is missing or
            not writable, or the file is one of the images.
    """
    path, folder = Path(output), Path(output).parent
    formats = _matplotlib_figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(
            f"cannot write {output}: expected a name that ends in one of "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )
    if not folder.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {folder}; create it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"cannot write {output}: it is a folder or write-protected")
    if path.exists() and any(os.path.exists(i) and path.samefile(i) for i in images):
        raise UserError(f"{output} is one of the images; choose another file for the figure")


def draw(
    names: Sequence[str], images: Sequence[Tensor], layers: Sequence[Layer], title: str
) -> Any:
    """Draw images, the maps of each layer laid over the images, and the histogram of each layer.

    A row is an image, a column a layer. The colours of a column span the middle 98 % of the
    values of its maps.

    Args:
        names (sequence of str): names of the images.
        images (sequence of Tensor[3, H, W]): values from 0 to 1.
        layers (sequence of Layer): see `collect`.
        title (str): title of the figure.

    Returns:
        matplotlib.figure.Figure: the figure.
    """
    rows, columns = len(images), 1 + len(layers)
    titles = [f"{_break(layer.path)}\n{format_shape(layer.maps[0].shape)}" for layer in layers]
    height, width = images[0].shape[1:]
    panel = _PANEL * height / width
    # From top to bottom, in inches: the title and the names of the layers; the panels, each with a
    # name above; the colour scales and the histograms.
    full = _GAP + columns * (_PANEL + _GAP)
    title = textwrap.fill(title, int(11.5 * full))
    top = 0.4 + 0.2 * title.count("\n") + 0.17 * max(name.count("\n") for name in titles)
    middle, bottom = rows * (panel + 0.25) + 0.1, 1.6
    size = (full, top + middle + bottom)
    figure = _matplotlib_figure(size)
    across = {"left": _GAP / full, "right": 1 - _GAP / full, "wspace": _GAP / _PANEL}
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw=across
        | {"top": 1 - (top + 0.25) / size[1], "bottom": (bottom + 0.1) / size[1]}
        | {"hspace": 0.25 / panel},
    )
    scales, histograms = figure.subplots(
        2,
        columns,
        squeeze=False,
        height_ratios=[0.08, 1.0],
        gridspec_kw=across
        | {"top": bottom / size[1], "bottom": 0.3 / size[1], "hspace": 0.4 / 0.5},
    )
    figure.text(_GAP / full, 1 - 0.1 / size[1], title, **_TITLE)
    for row, name, image in zip(panels, names, images, strict=True):
        pixels = image.clamp(0, 1).movedim(0, -1).numpy()
        for axis in row:
            axis.set_axis_off()
            axis.imshow(pixels if axis is row[0] else pixels.mean(-1), cmap="gray", vmin=0, vmax=1)
        row[0].set_title(_shorten(name, 24), **_LABEL)
    for axis, text in ((scales[0], "gate, mean over\nchannels"), (histograms[0], _HISTOGRAM)):
        axis.set_axis_off()
        axis.text(0, 1, text, va="top", **_LABEL)
    for column, (layer, name) in enumerate(zip(layers, titles, strict=True), start=1):
        panels[0, column].set_title(name, **_LABEL)
        laid = _overlay(layer.maps, panels[:, column])
        scale = figure.colorbar(
            laid, cax=scales[column], orientation="horizontal", extend="both", extendfrac=0.04
        )
        ends = (laid.norm.vmin, laid.norm.vmax)
        scale.set_ticks(ends, labels=[f"{end:.3f}" for end in ends])
        scale.ax.tick_params(labelsize=9, length=0, colors=_INK)
        for label, side in zip(scale.ax.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
        _draw_histogram(histograms[column], layer)
    histograms[1].set_yticks(
        [1e-6, 1e-4, 1e-2, 1], ["0.0001 %", "0.01 %", "1 %", "100 %"], fontsize=9
    )
    return figure


def save(figure: Any, output: str) -> None:
    """Write a figure to a file, in the format that the suffix of the file names.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        figure.savefig(output, dpi=150)
    except Exception as error:  # of the file, the format or the figure's size
        raise UserError(f"cannot write {output} ({one_line(error)})") from error


def _matplotlib_figure(size: tuple[float, float] | None = None) -> Any:
    return import_optional("matplotlib.figure", "viz").Figure(size)


def _overlay(maps: Sequence[Tensor], panels: Sequence[Any]) -> Any:
    """Lay maps over the images in panels, with one colour scale; returns the last overlay."""
    values = torch.cat([gates.flatten() for gates in maps])
    low, high = values.quantile(torch.tensor([0.01, 0.99])).tolist()
    high = max(high, low + 0.001)  # a narrower scale would show rounding errors
    for panel, gates in zip(panels, maps, strict=True):
        laid = panel.imshow(
            gates.numpy(),
            cmap="inferno",
            alpha=0.6,
            vmin=low,
            vmax=high,
            extent=panel.images[0].get_extent(),
            interpolation="bilinear",
        )
    return laid


def _draw_histogram(axis: Any, layer: Layer) -> None:
    share = layer.counts / layer.counts.sum()
    edges = torch.linspace(layer.bounds[0], 1, len(share) + 1)
    axis.stairs(share.numpy(), edges.numpy(), fill=True, color=_BAR)
    bounds = sorted(set(layer.bounds))
    for bound in bounds:
        axis.axvline(bound, color=_INK, linewidth=1, linestyle=":")
    axis.set(yscale="log", ylim=(1e-6, 1.5), xlim=(0.56, 1.06))
    axis.set_xticks(bounds, [f"{bound:.3f}" for bound in bounds], fontsize=9)
    axis.set_yticks([])
    axis.minorticks_off()
    axis.tick_params(colors=_INK)
    axis.spines[["top", "right"]].set_visible(False)


def _shorten(name: str, length: int) -> str:
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _break(path: str) -> str:
    """Break a path at its dots into lines that fit a panel."""
    lines = [""]
    for part in path.split("."):
        if lines[-1] and len(lines[-1]) + len(part) > 20:
            lines.append("")
        lines[-1] += f"{part}."
    return "\n".join(lines).removesuffix(".")
