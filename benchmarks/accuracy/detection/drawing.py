"""A picture of what a detector finds."""

from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from benchmarks.accuracy.common.log import png_figure

from .coco import Split
from .dataset import Images

LEAST = 0.5  # score of a detection that is drawn
COLUMNS, ROWS = 4, 2


def draw(split: Split, detections: list[dict[str, Any]], path: Path) -> None:
    """Draw the first images of a split with their boxes, masks, categories and scores.

    Args:
        split (Split): the images.
        detections (list of dict): what was found in them, in COCO's format.
        path (Path): the PNG file.
    """
    names = split.categories
    with png_figure(path, 4 * COLUMNS, 3.2 * ROWS) as figure:
        axes = figure.subplots(ROWS, COLUMNS).flat
        for plot in axes:
            plot.axis("off")
        for plot, (image, number) in zip(figure.axes, Images(split), strict=False):
            canvas = image.permute(1, 2, 0).numpy().copy()
            drawn = [d for d in detections if d["image_id"] == number and d["score"] >= LEAST]
            for found in sorted(drawn, key=lambda d: d["score"]):  # the surest on top
                colour = np.array(_colour(list(names).index(found["category_id"])))
                if "segmentation" in found:
                    mask = rle.decode(found["segmentation"]).astype(bool)
                    canvas[mask] = 0.5 * canvas[mask] + 0.5 * colour
                x, y, width, height = found["bbox"]
                plot.plot(
                    [x, x + width, x + width, x, x], [y, y, y + height, y + height, y], c=colour
                )
                label = f"{names[found['category_id']]} {found['score']:.2f}"
                text = plot.text(
                    x, y, label, va="bottom", fontsize=8, c="w", backgroundcolor=colour
                )
                text.set_in_layout(False)  # it may reach over the edge
            plot.imshow(canvas)


def _colour(number: int) -> tuple[float, float, float]:
    return hsv_to_rgb(0.618 * number % 1, 0.9, 0.8)
