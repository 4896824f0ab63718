"""Recipes: every number of the paper's trainings for classification, and of a small one.

Where the paper and the authors' commands differ, the recipe follows the commands: for MobileNetV2
they set the learning rate to 0.05, the paper to 0.5.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How to train a network.

    Attributes:
        model (str): the default network.
        e_lambda (float): lambda of SimAM.
        batch_size (int): images per optimizer step, over all devices.
        lr (float): initial learning rate.
        weight_decay (float): applied to all parameters.
        length (int): length of the training, in `unit`.
        unit (str): "epoch" or "step", the unit of length and milestones.
        milestones (tuple of int): when the learning rate is divided by 10; without milestones it
            falls to 0 along a cosine, step by step.
        crop (str): "resized" crops at random size and aspect ratio, then resizes; "padded" pads,
            then crops to the size before padding.
        input_size (int or None): side of the network's input; None keeps the size of the images.
        resize (int or None): shorter side before the centre crop of test images.
        padding (int): pixels added on every side, for "padded".
        flip (bool): whether half of the training images are mirrored.
        momentum (float): of SGD.
    """

    model: str
    e_lambda: float
    batch_size: int
    lr: float
    weight_decay: float
    length: int
    milestones: tuple[int, ...]
    crop: Literal["resized", "padded"]
    input_size: int | None
    resize: int | None
    padding: int
    flip: bool
    unit: Literal["epoch", "step"] = "epoch"
    momentum: float = 0.9

    def total_steps(self, steps_per_epoch: int, epochs: int | None = None) -> int:
        """Number of optimizer steps in a training.

        Args:
            steps_per_epoch (int): optimizer steps in an epoch.
            epochs (int, optional): length of the training; by default the recipe's.
        """
        if epochs is None and self.unit == "step":
            return self.length
        return (self.length if epochs is None else epochs) * steps_per_epoch


RECIPES = {
    "small": Recipe(
        model="cifar_resnet20",
        e_lambda=1e-4,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        length=15,
        milestones=(),
        crop="padded",
        input_size=None,
        resize=None,
        padding=1,
        flip=False,
    ),
    "paper-resnet": Recipe(
        model="resnet18",
        e_lambda=0.1,
        batch_size=256,
        lr=0.1,
        weight_decay=1e-4,
        length=100,
        milestones=(30, 60, 90),
        crop="resized",
        input_size=224,
        resize=256,
        padding=0,
        flip=True,
    ),
    "paper-mobilenetv2": Recipe(
        model="mobilenet_v2",
        e_lambda=0.1,
        batch_size=256,
        lr=0.05,
        weight_decay=4e-5,
        length=150,
        milestones=(),
        crop="resized",
        input_size=224,
        resize=256,
        padding=0,
        flip=True,
    ),
    "paper-cifar": Recipe(
        model="cifar_resnet20",
        e_lambda=1e-4,
        batch_size=128,
        lr=0.1,
        weight_decay=5e-4,
        length=64_000,  # 164 epochs of CIFAR
        unit="step",
        milestones=(32_000, 48_000),
        crop="padded",
        input_size=32,
        resize=None,
        padding=4,
        flip=True,
    ),
}
