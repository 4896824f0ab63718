"""The paper's recipes for classification, number by number, and a small one.

Where the paper and the authors' commands differ, the commands: for MobileNetV2 they say 0.05, the
paper 0.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How to train; every number can be given on the command line instead.

    Attributes:
        model (str): the network, if none is named.
        e_lambda (float): of SimAM.
        batch_size (int): images of a step, on all devices together.
        lr (float): the learning rate at the start.
        weight_decay (float): of all parameters.
        epochs (int or None): length of the training, or
        steps (int or None): its length in steps, whatever an epoch is.
        milestones (tuple of int): when the learning rate is divided by 10, in the unit of the
            length; none: it falls to 0 along a cosine, step by step.
        crop (str): "resized", a crop of random size and shape, resized; "padded", a crop of the
            image's own size after padding.
        input_size (int or None): side of what the network sees; None: that of the images.
        resize (int or None): short side before the centre crop that is evaluated.
        padding (int): pixels on every side, for "padded".
        flip (bool): mirror half of the images.
        momentum (float): of SGD.
    """

    model: str
    e_lambda: float
    batch_size: int
    lr: float
    weight_decay: float
    epochs: int | None
    steps: int | None
    milestones: tuple[int, ...]
    crop: str
    input_size: int | None
    resize: int | None
    padding: int
    flip: bool
    momentum: float = 0.9


RECIPES = {
    "small": Recipe(
        model="cifar_resnet20",
        e_lambda=1e-4,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        epochs=15,
        steps=None,
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
        epochs=100,
        steps=None,
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
        epochs=150,
        steps=None,
        milestones=(),
        crop="resized",
        input_size=224,
        resize=256,
        padding=0,
        flip=True,
    ),
    "paper-cifar": Recipe(  # 64,000 steps are 164 epochs of CIFAR
        model="cifar_resnet20",
        e_lambda=1e-4,
        batch_size=128,
        lr=0.1,
        weight_decay=5e-4,
        epochs=None,
        steps=64_000,
        milestones=(32_000, 48_000),
        crop="padded",
        input_size=32,
        resize=None,
        padding=4,
        flip=True,
    ),
}


def length(recipe: Recipe, steps_per_epoch: int, epochs: int | None = None) -> int:
    """Steps of a training, by the recipe or for so many epochs."""
    if epochs is None and recipe.steps is not None:
        return recipe.steps
    return (recipe.epochs if epochs is None else epochs) * steps_per_epoch


def optimizer(
    model: nn.Module, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """SGD, without Nesterov's change; weight decay on all parameters, norms and biases too."""
    return create_optimizer_v2(
        model,
        "momentum",
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        filter_bias_and_bn=False,
    )


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Scheduler:
    """The learning rate over a training of so many steps; milestones keep their share of it."""
    whole = recipe.steps if recipe.epochs is None else recipe.epochs
    if recipe.milestones:
        return steps_down(optimizer, [m * steps // whole for m in recipe.milestones])
    return CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)


def steps_down(optimizer: torch.optim.Optimizer, milestones: Sequence[int]) -> Scheduler:
    """A tenth of the learning rate from each of these steps on."""
    one_later = [milestone + 1 for milestone in milestones]  # timm's come one step early
    return MultiStepLRScheduler(optimizer, one_later, decay_rate=0.1, t_in_epochs=False)
