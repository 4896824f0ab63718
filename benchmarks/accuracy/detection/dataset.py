"""Images of a split as tensors, with the targets that torchvision's detectors train on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from simam.messages import UserError, one_line

from .coco import Split, corners


class EvaluationDataset(Dataset[tuple[Tensor, int]]):
    """All images of a split, each with its id.

    Args:
        split (Split): the images and their annotations.
    """

    def __init__(self, split: Split) -> None:
        self.split, self.images = split, split.content["images"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return _read_image(self.split.folder / image["file_name"], image), image["id"]


class TrainingDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The images of a split that have objects, mirrored at random, with their targets.

    Args:
        split (Split): the images and their annotations.
        masks (bool): whether the targets include masks.
        flip (float): the probability that an image is mirrored.
    """

    def __init__(self, split: Split, *, masks: bool, flip: float) -> None:
        self.split, self.masks, self.flip = split, masks, flip
        self.images = [image for image in split.content["images"] if image["id"] in split.objects]
        self.labels = {category: label for label, category in enumerate(split.categories, 1)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images[index]
        width, height = image["width"], image["height"]
        objects = self.split.objects[image["id"]]
        pixels = _read_image(self.split.folder / image["file_name"], image)
        boxes = torch.tensor(
            [corners(o["bbox"], width, height) for o in objects], dtype=torch.float32
        )
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects]),
        }
        if self.masks:
            file = self.split.file
            masks = [_decode_mask(o["segmentation"], width, height, file) for o in objects]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
            target["boxes"] = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
            )
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return pixels, target


def _read_image(path: Path, entry: dict[str, Any]) -> Tensor:
    """Read an image as RGB values from 0 to 1; its size must be the one in its COCO entry."""
    try:
        with Image.open(path) as file:
            pixels: Tensor = pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # PIL's readers raise many types for a damaged file
        raise UserError(f"cannot read the image {path}: {one_line(error)}") from error
    height, width = pixels.shape[1:]
    if (width, height) != (entry["width"], entry["height"]):
        raise UserError(
            f"{path} is {width} pixels wide and {height} high; its annotations expect "
            f"{entry['width']} and {entry['height']}"
        )
    return pixels.float() / 255


def _decode_mask(segmentation: Any, width: int, height: int, file: Path) -> NDArray[np.uint8]:
    """Decode polygons or a run-length code."""
    try:
        if isinstance(segmentation, list):
            segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, height, width)
        mask: NDArray[np.uint8] = rle.decode(segmentation)
    except Exception as error:
        raise UserError(
            f"{file}: cannot decode the mask {segmentation!r:.60} ({one_line(error)})"
        ) from error
    if mask.shape != (height, width):
        raise UserError(
            f"{file}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of "
            f"{width} x {height}"
        )
    return mask
