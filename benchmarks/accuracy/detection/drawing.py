"""Draws the detections in the first images of a split."""

from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from benchmarks.accuracy.common.log import png_figure

from .coco import Split
from .dataset import EvaluationDataset

MIN_SCORE = 0.5  # of a detection that is drawn
COLUMNS, ROWS = 4, 2


def draw(split: Split, detections: list[dict[str, Any]], path: Path) -> None:
    """Draw the first images of a split with their boxes, masks, categories and scores.

    Args:
        split (Split): the images.
        detections (list of dict): detections in these images, in COCO's format.
        path (Path): the PNG file to write.
    """
    names = split.categories
    images = EvaluationDataset(split)
    with png_figure(path, 4 * COLUMNS, 3.2 * ROWS) as figure:
        for plot in figure.subplots(ROWS, COLUMNS).flat:
            plot.axis("off")
        for plot, index in zip(figure.axes, range(len(images)), strict=False):
            image, image_id = images[index]
            canvas = image.permute(1, 2, 0).numpy().copy()
            shown = [d for d in detections if d["image_id"] == image_id and d["score"] >= MIN_SCORE]
            for detection in sorted(shown, key=lambda d: d["score"]):  # the highest score on top
                category = detection["category_id"]
                colour = np.array(_colour(list(names).index(category)))
                if "segmentation" in detection:
                    mask = rle.decode(detection["segmentation"]).astype(bool)
                    canvas[mask] = 0.5 * canvas[mask] + 0.5 * colour
                x, y, width, height = detection["bbox"]
                plot.plot(
                    [x, x + width, x + width, x, x], [y, y, y + height, y + height, y], c=colour
                )
                label = f"{names[category]} {detection['score']:.2f}"
                text = plot.text(
                    x, y, label, va="bottom", fontsize=8, c="w", backgroundcolor=colour
                )
                text.set_in_layout(False)  # a label may extend past the edge of its plot
            plot.imshow(canvas)


def _colour(index: int) -> tuple[float, float, float]:
    return hsv_to_rgb(0.618 * index % 1, 0.9, 0.8)
