"""Draws a small data set of shapes in COCO's format, reproducible from a seed."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from benchmarks.accuracy.common.checkpoint import write_atomically

from .coco import Content

CATEGORIES = ("circle", "rectangle", "triangle")
SPLITS = {"train": 400, "val": 100}
WIDTH, HEIGHT = 160, 120
RADIUS_RANGE = 12, 34
MAX_SHAPES = 4  # in one image
MIN_VISIBLE = 0.5  # fraction of every shape that later shapes must leave uncovered
MIN_CONTRAST = 50  # between a shape's colour and the pixels that it covers, out of 255

Mask: TypeAlias = NDArray[np.bool_]


def write(folder: Path, splits: dict[str, int] = SPLITS, *, seed: int = 0) -> None:
    """Draw the data set, except for splits that exist already.

    Args:
        folder (Path): gets `train/`, `val/` and `annotations/`, as in COCO's layout.
        splits (dict of str to int): number of images in each split.
        seed (int): the seed of the images.
    """
    for index, (split, count) in enumerate(splits.items()):
        file = folder / "annotations" / f"instances_{split}.json"
        if not file.exists():  # the annotations are written last, so the images exist, too
            content = _write_images(folder / split, SeedSequence((seed, index)).spawn(count))
            write_atomically(file, _writer(json.dumps(content).encode()))


def _writer(content: bytes) -> Callable[[IO[bytes]], object]:
    return lambda file: file.write(content)


def _write_images(folder: Path, seeds: list[SeedSequence]) -> Content:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, seed in enumerate(seeds, 1):
        image, shapes = draw(default_rng(seed))
        jpeg = io.BytesIO()
        image.save(jpeg, "jpeg", quality=92)
        name = f"{image_id:06}.jpg"
        write_atomically(folder / name, _writer(jpeg.getvalue()))
        images.append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category, mask in shapes:
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            annotations.append(ids | _annotation(mask))
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw(random: Generator) -> tuple[Image.Image, list[tuple[int, Mask]]]:
    """Draw one image; returns it with the category and the visible mask of every shape."""
    canvas = _background(random)
    shapes: list[tuple[int, Mask]] = []
    full_areas: list[int] = []  # with the covered parts
    wanted = random.integers(1, MAX_SHAPES + 1)
    for _ in range(3 * wanted):  # a shape may be rejected
        category = int(random.integers(len(CATEGORIES)))
        mask = _fill(_outline(category, random))
        visible = [(kind, below & ~mask) for kind, below in shapes]
        if any(
            below.sum() < MIN_VISIBLE * area
            for (_, below), area in zip(visible, full_areas, strict=True)
        ):
            continue
        colour = random.uniform(0, 255, 3)
        if np.abs(colour - canvas[mask].mean(0)).mean() < MIN_CONTRAST:
            continue
        canvas[mask] = colour + random.normal(0, 8, (mask.sum(), 3))
        shapes = [*visible, (category + 1, mask)]
        full_areas.append(mask.sum())
        if len(shapes) == wanted:
            break
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), shapes


def _background(random: Generator) -> NDArray[np.float64]:
    """Blurred spots, stripes and noise."""
    spots = Image.fromarray(random.integers(40, 216, (4, 5, 3), dtype=np.uint8))
    canvas = np.asarray(spots.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wave = random.uniform(-0.6, 0.6, 2)
    stripes: NDArray[np.float64] = 15 * np.sin(wave[0] * x + wave[1] * y)
    return canvas + stripes[..., None] + random.normal(0, 10, canvas.shape)


def _outline(category: int, random: Generator) -> NDArray[np.float64]:
    """The corners of a shape at a random position, rotated by a random angle."""
    radius = random.uniform(*RADIUS_RANGE)
    if CATEGORIES[category] == "rectangle":
        corner = np.arctan(random.uniform(0.5, 1))
        angles = np.array([corner, np.pi - corner, np.pi + corner, -corner])
    else:
        corners = 3 if CATEGORIES[category] == "triangle" else 48
        angles = np.arange(corners) * 2 * np.pi / corners
    angles = angles + random.uniform(0, 2 * np.pi)
    centre = random.uniform(radius, (WIDTH - radius, HEIGHT - radius))
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _fill(outline: NDArray[np.float64]) -> Mask:
    """The mask of a polygon."""
    mask = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in outline], fill=1)
    return np.asarray(mask)


def _annotation(mask: Mask) -> dict[str, Any]:
    """The keys of an annotation that follow from its mask."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "bbox": rle.toBbox(code).tolist(),
        "area": float(mask.sum()),
        "iscrowd": 0,
        "segmentation": code | {"counts": code["counts"].decode()},
    }
