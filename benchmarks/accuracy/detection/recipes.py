"""Recipes: named sets of every hyperparameter that decides what a detector learns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simam.messages import UserError

MODELS = tuple(
    f"{detector}_resnet{depth}_fpn"
    for detector in ("fasterrcnn", "maskrcnn")
    for depth in (18, 34, 50, 101)
)
ATTENTION = "simam", "none"


def _described(text: str) -> Any:
    """A field with a help text for the command line."""
    return field(metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training; each is an option of the command line."""

    model: str = _described(f"the detector: {', '.join(MODELS)}")
    attention: str = _described(f"attention in the backbone: {', '.join(ATTENTION)}")
    epochs: int = _described("passes over the training images; the milestones scale with them")
    batch_size: int = _described(
        "images per optimizer step, over all processes and gradient-accumulation steps"
    )
    lr: float = _described("learning rate of SGD")
    momentum: float = _described("momentum of SGD")
    weight_decay: float = _described("weight decay of SGD, for every trained parameter")
    milestones: tuple[float, ...] = _described(
        "epochs after which the learning rate falls to a tenth"
    )
    warmup_steps: int = _described("optimizer steps of linear warmup")
    warmup_factor: float = _described("fraction of the learning rate at which warmup starts")
    e_lambda: float = _described("lambda of SimAM")
    min_size: int = _described("length of the shorter side of an image, in pixels")
    max_size: int = _described("upper limit of the longer side, in pixels")
    flip: float = _described("probability that an image is mirrored, from 0 to 1")
    frozen_stages: int = _described(
        "backbone stages that do not train; 1 is the stem and layer1, 0 none"
    )
    norm_eval: bool = _described(
        "batch norms of the backbone keep their running statistics during training"
    )
    channels: int = _described(
        "channels of the feature pyramid and the mask head; the box head has 4 times as many"
    )
    regions: int = _described("region proposals per image that the heads train on in one step")
    anchor_sizes: tuple[int, ...] = _described("anchor sizes of the five pyramid levels, in pixels")

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("model", self.model in MODELS, f"one of {', '.join(MODELS)}"),
            ("attention", self.attention in ATTENTION, f"one of {', '.join(ATTENTION)}"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", self.lr > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("milestones", all(m > 0 for m in self.milestones), "epochs greater than 0"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("warmup_factor", 0 <= self.warmup_factor <= 1, "0 to 1"),
            ("e_lambda", 0 < self.e_lambda < float("inf"), "more than 0"),
            ("min_size", self.min_size >= 32, "32 or more"),
            ("max_size", self.max_size >= self.min_size, f"{self.min_size} (--min-size) or more"),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            ("frozen_stages", 0 <= self.frozen_stages <= 4, "0 to 4"),
            ("channels", self.channels >= 1, "1 or more"),
            ("regions", self.regions >= 1, "1 or more"),
            (
                "anchor_sizes",
                len(self.anchor_sizes) == 5 and min(self.anchor_sizes) > 0,
                "five sizes of 1 or more",
            ),
        ):
            if not valid:
                option, got = f"--{name.replace('_', '-')}", getattr(self, name)
                got = " ".join(map(str, got)) if isinstance(got, tuple) else got
                raise UserError(f"{option}: expected {expected}, got {got}")

    @property
    def masks(self) -> bool:
        """Whether the detector predicts masks, too."""
        return self.model.startswith("maskrcnn")

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a copy with other values; milestones scale with the epochs unless given.

        Raises:
            UserError: a value is out of range.
        """
        recipe = replace(self, **values)
        if "milestones" in values:
            return recipe
        factor = recipe.epochs / self.epochs
        return replace(recipe, milestones=tuple(m * factor for m in self.milestones))

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of an optimizer step.

        Args:
            step (int): number of the step, from 0.
            steps_per_epoch (int): optimizer steps in an epoch.
        """
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in self.milestones)
        rate = self.lr * 0.1**passed
        if step < self.warmup_steps:
            start = self.warmup_factor
            rate *= start + (1 - start) * step / self.warmup_steps
        return rate


RECIPES = {
    # The paper's training on COCO. What the paper leaves open is as in torchvision's detector.
    "paper-coco": Recipe(
        model="fasterrcnn_resnet50_fpn",
        attention="simam",
        epochs=12,
        batch_size=8,
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(8, 11),
        warmup_steps=500,
        warmup_factor=0.001,
        e_lambda=0.1,
        min_size=800,
        max_size=1333,
        flip=0.5,
        frozen_stages=1,
        norm_eval=True,
        channels=256,
        regions=512,
        anchor_sizes=(32, 64, 128, 256, 512),
    ),
    # Trains a detector of drawn shapes from random weights, in minutes on two cores.
    "shapes": Recipe(
        model="maskrcnn_resnet18_fpn",
        attention="simam",
        epochs=8,
        batch_size=4,
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(6, 7),
        warmup_steps=50,
        warmup_factor=0.001,
        e_lambda=0.1,
        min_size=72,
        max_size=120,
        flip=0.5,
        frozen_stages=0,
        norm_eval=False,
        channels=64,
        regions=64,
        anchor_sizes=(12, 24, 48, 96, 192),
    ),
}
