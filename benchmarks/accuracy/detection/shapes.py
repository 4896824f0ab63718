"""A set of drawn shapes in COCO's format: small, made in seconds, and the same for a seed."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from benchmarks.accuracy.common.checkpoint import write_atomically

CATEGORIES = ("circle", "rectangle", "triangle")
SPLITS = {"train": 400, "val": 100}
WIDTH, HEIGHT = 160, 120
RADII = 12, 34
MOST = 4  # shapes in a picture
VISIBLE = 0.5  # the part of every shape that those on top of it leave
CONTRAST = 50  # between the colours of a shape and of the background around it, of 255


def write(folder: Path, splits: dict[str, int] = SPLITS, *, seed: int = 0) -> None:
    """Draw the set, unless it is there.

    Args:
        folder (Path): gets `train/`, `val/` and `annotations/`, as COCO's has.
        splits (dict of str to int): number of pictures in each part.
        seed (int): another seed, other pictures.
    """
    for part, (split, pictures) in enumerate(splits.items()):
        file = folder / "annotations" / f"instances_{split}.json"
        if not file.exists():  # written last, so that the pictures are there, too
            content = _write_pictures(folder / split, SeedSequence((seed, part)).spawn(pictures))
            text = json.dumps(content).encode()
            write_atomically(file, lambda opened, text=text: opened.write(text))


def _write_pictures(folder: Path, seeds: list[SeedSequence]) -> dict[str, list[dict[str, Any]]]:
    images, annotations = [], []
    for number, seed in enumerate(seeds, 1):
        picture, shapes = draw(default_rng(seed))
        jpeg = io.BytesIO()
        picture.save(jpeg, "jpeg", quality=92)
        name = f"{number:06}.jpg"
        write_atomically(folder / name, lambda file, jpeg=jpeg: file.write(jpeg.getvalue()))
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category, mask in shapes:
            found = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(found | _described(mask))
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw(random: Generator) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """One picture, and of every shape in it the category and the mask of what one sees of it."""
    canvas = _background(random)
    shapes: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []  # of the whole shapes
    wanted = random.integers(1, MOST + 1)
    for _ in range(3 * wanted):  # not every try finds a place
        category = int(random.integers(len(CATEGORIES)))
        mask = _filled(_outline(category, random))
        seen = [(kind, below & ~mask) for kind, below in shapes]
        if any(s.sum() < VISIBLE * area for (_, s), area in zip(seen, areas, strict=True)):
            continue
        colour = random.uniform(0, 255, 3)
        if np.abs(colour - canvas[mask].mean(0)).mean() < CONTRAST:
            continue
        canvas[mask] = colour + random.normal(0, 8, (mask.sum(), 3))
        shapes = [*seen, (category + 1, mask)]
        areas.append(mask.sum())
        if len(shapes) == wanted:
            break
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), shapes


def _background(random: Generator) -> np.ndarray:
    """Blurred spots, stripes and grain."""
    spots = Image.fromarray(random.integers(40, 216, (4, 5, 3), dtype=np.uint8))
    canvas = np.asarray(spots.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wave = random.uniform(-0.6, 0.6, 2)
    stripes = 15 * np.sin(wave[0] * x + wave[1] * y)
    return canvas + stripes[..., None] + random.normal(0, 10, canvas.shape)


def _outline(category: int, random: Generator) -> np.ndarray:
    """The corners of a shape somewhere in the picture, turned at random."""
    radius = random.uniform(*RADII)
    if CATEGORIES[category] == "rectangle":
        corner = np.arctan(random.uniform(0.5, 1))
        angles = np.array([corner, np.pi - corner, np.pi + corner, -corner])
    else:
        corners = 3 if CATEGORIES[category] == "triangle" else 48
        angles = np.arange(corners) * 2 * np.pi / corners
    angles = angles + random.uniform(0, 2 * np.pi)
    centre = random.uniform(radius, (WIDTH - radius, HEIGHT - radius))
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _filled(outline: np.ndarray) -> np.ndarray:
    mask = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in outline], fill=1)
    return np.asarray(mask)


def _described(mask: np.ndarray) -> dict[str, Any]:
    """What an annotation says of a mask."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "bbox": rle.toBbox(code).tolist(),
        "area": float(mask.sum()),
        "iscrowd": 0,
        "segmentation": code | {"counts": code["counts"].decode()},
    }
