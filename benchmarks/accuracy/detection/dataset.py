"""The images of a split as tensors, with what torchvision's detectors learn from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from simam.messages import UserError, one_line

from .coco import Split, corners


class Images(Dataset):
    """All images of a split, each with its id; for evaluation.

    Args:
        split (Split): what is in them.
    """

    def __init__(self, split: Split) -> None:
        self.split, self.images = split, split.content["images"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return _read(self.split.folder / image["file_name"], image), image["id"]


class Examples(Dataset):
    """The images of a split that have objects, mirrored at random; for training.

    Args:
        split (Split): what is in them.
        masks (bool): whether to give masks, too.
        flip (float): how often to mirror an image.
    """

    def __init__(self, split: Split, *, masks: bool, flip: float) -> None:
        self.split, self.masks, self.flip = split, masks, flip
        self.images = [image for image in split.content["images"] if image["id"] in split.objects]
        self.labels = {category: label for label, category in enumerate(split.categories, 1)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images[index]
        size = image["width"], image["height"]
        objects = self.split.objects[image["id"]]
        pixels = _read(self.split.folder / image["file_name"], image)
        boxes = torch.tensor([corners(o["bbox"], *size) for o in objects], dtype=torch.float32)
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects]),
        }
        if self.masks:
            masks = [_mask(o["segmentation"], *size, self.split.file) for o in objects]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
            target["boxes"] = torch.stack(
                [size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]], 1
            )
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return pixels, target


def _read(path: Path, described: dict[str, Any]) -> Tensor:
    """The pixels, from 0 to 1, of an image that must be as large as its description says."""
    try:
        with Image.open(path) as file:
            pixels = pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # a broken image may break anywhere in its reader
        raise UserError(f"cannot read the image {path}: {one_line(error)}") from error
    height, width = pixels.shape[1:]
    if (width, height) != (described["width"], described["height"]):
        raise UserError(
            f"{path} is {width} pixels wide and {height} high; its annotations are for "
            f"{described['width']} and {described['height']}"
        )
    return pixels.float() / 255


def _mask(segmentation: Any, width: int, height: int, file: Path) -> np.ndarray:
    """The mask of polygons or run lengths."""
    try:
        if isinstance(segmentation, list):
            segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, height, width)
        mask = rle.decode(segmentation)
    except Exception as error:
        raise UserError(
            f"{file}: no mask can be made of {segmentation!r:.60} ({one_line(error)})"
        ) from error
    if mask.shape != (height, width):
        raise UserError(
            f"{file}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of "
            f"{width} x {height}"
        )
    return mask
