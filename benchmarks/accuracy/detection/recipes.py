"""Recipes: under a name, every number that decides what a detector learns."""

from dataclasses import dataclass, field, replace
from typing import Any

from simam.messages import UserError

MODELS = tuple(
    f"{detector}_resnet{depth}_fpn"
    for detector in ("fasterrcnn", "maskrcnn")
    for depth in (18, 34, 50, 101)
)
ATTENTION = "simam", "none"


def _is(meaning: str) -> Any:
    return field(metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training; each is an option of the command line."""

    model: str = _is(f"the detector: {', '.join(MODELS)}")
    attention: str = _is(f"in the backbone: {', '.join(ATTENTION)}")
    epochs: int = _is("how often to see all images; the milestones move with it")
    batch_size: int = _is("images of one step, in all processes and accumulations together")
    lr: float = _is("learning rate of SGD")
    momentum: float = _is("its momentum")
    weight_decay: float = _is("its weight decay, on all that trains")
    milestones: tuple[float, ...] = _is("after how many epochs the rate falls to a tenth")
    warmup_steps: int = _is("steps in which the rate grows linearly")
    warmup_factor: float = _is("the part of the rate that it starts from")
    e_lambda: float = _is("lambda of SimAM")
    min_size: int = _is("shorter side of an image, in pixels")
    max_size: int = _is("the most of its longer side")
    flip: float = _is("how often an image is mirrored, from 0 to 1")
    frozen_stages: int = _is("stages of the backbone that do not train; 1 is the stem and layer1")
    norm_eval: bool = _is("batch norms of the backbone keep the statistics they are given")
    channels: int = _is(
        "channels of the pyramid and the mask head; the box head has 4 times as many"
    )
    regions: int = _is("regions of an image that the heads learn from in one step")
    anchor_sizes: tuple[int, ...] = _is("sides of the anchors at the five levels, in pixels")

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("model", self.model in MODELS, f"one of {', '.join(MODELS)}"),
            ("attention", self.attention in ATTENTION, f"one of {', '.join(ATTENTION)}"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", self.lr > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "0 or more and less than 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("milestones", all(m > 0 for m in self.milestones), "epochs after the start"),
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
            if not right:
                option, got = f"--{name.replace('_', '-')}", getattr(self, name)
                got = " ".join(map(str, got)) if isinstance(got, tuple) else got
                raise UserError(f"{option}: expected {expected}, got {got}")

    @property
    def masks(self) -> bool:
        """Whether the detector finds masks, too."""
        return self.model.startswith("maskrcnn")

    def changed(self, changes: dict[str, Any]) -> "Recipe":
        """This recipe with other numbers; milestones that are not among them keep their place.

        Raises:
            UserError: a number is out of its range.
        """
        changed = replace(self, **changes)
        if "milestones" in changes:
            return changed
        stretch = changed.epochs / self.epochs
        return replace(changed, milestones=tuple(m * stretch for m in self.milestones))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step.

        Args:
            step (int): number of the step, from 0.
            steps (int): steps in an epoch.
        """
        rate = self.lr * 0.1 ** sum(step >= round(epoch * steps) for epoch in self.milestones)
        if step < self.warmup_steps:
            start = self.warmup_factor
            rate *= start + (1 - start) * step / self.warmup_steps
        return rate


RECIPES = {
    # The paper's training on COCO. Where it says nothing, the detector is torchvision's.
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
    # From random weights to a detector of drawn shapes within minutes, on two cores.
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
