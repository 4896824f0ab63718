"""What becomes of an image before a network sees it."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from .recipes import Recipe

Transform: TypeAlias = Callable[[Image.Image], Tensor]


def transforms(
    recipe: Recipe, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Transform, Transform]:
    """Make the transforms for training and for evaluation.

    Args:
        recipe (Recipe): which crops.
        size (int): side of what the network sees.
        mean (tuple of float): of each channel, between 0 and 1, which is subtracted.
        std (tuple of float): standard deviation of each channel, which is divided by.
    """
    if recipe.crop == "resized":
        options = {"interpolation": "bilinear", "mean": mean, "std": std}
        flip = 0.5 if recipe.flip else 0.0
        train = create_transform(size, is_training=True, hflip=flip, color_jitter=None, **options)
        # timm resizes the short side to size / crop_pct, rounded down.
        whole = recipe.resize or size
        return train, create_transform(size, crop_pct=size / whole, **options)
    fit = [v2.RGB(), v2.Resize(size), v2.CenterCrop(size)]
    move = [v2.RandomCrop(size, padding=recipe.padding)] if recipe.padding else []
    move += [v2.RandomHorizontalFlip()] if recipe.flip else []
    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*fit, *move, *finish]), v2.Compose([*fit, *finish])
