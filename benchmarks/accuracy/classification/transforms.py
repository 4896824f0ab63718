"""The transforms of a recipe, for training and for test images."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from .recipes import Recipe

Transform: TypeAlias = Callable[[Image.Image], Tensor]


def make_transforms(
    recipe: Recipe, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Transform, Transform]:
    """Make the transform of training images and that of test images.

    Args:
        recipe (Recipe): which crops.
        size (int): side of the network's input, in pixels.
        mean (tuple of float): subtracted from each channel, whose values are from 0 to 1.
        std (tuple of float): standard deviation that each channel is divided by.
    """
    if recipe.crop == "resized":
        options: dict[str, Any] = {"interpolation": "bilinear", "mean": mean, "std": std}
        augment: dict[str, Any] = {"hflip": 0.5 if recipe.flip else 0.0, "color_jitter": None}
        train = create_transform(size, is_training=True, **augment, **options)
        # timm resizes the shorter side to size / crop_pct, rounded down.
        crop_pct = size / (recipe.resize or size)
        return train, create_transform(size, crop_pct=crop_pct, **options)
    fit = [v2.RGB(), v2.Resize(size), v2.CenterCrop(size)]
    moves = [v2.RandomCrop(size, padding=recipe.padding)] if recipe.padding else []
    moves += [v2.RandomHorizontalFlip()] if recipe.flip else []
    normalize = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*fit, *moves, *normalize]), v2.Compose([*fit, *normalize])
