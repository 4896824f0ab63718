"""The optimizer and the learning-rate schedule of a recipe."""

from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .recipes import Recipe


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """SGD with momentum, not Nesterov's; weight decay also applies to norms and biases."""
    return create_optimizer_v2(
        model,
        "momentum",
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        filter_bias_and_bn=False,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> Scheduler:
    """The recipe's learning rate, step by step; its milestones are scaled to `total_steps`."""
    if recipe.milestones:
        return _multistep(optimizer, [m * total_steps // recipe.length for m in recipe.milestones])
    return CosineLRScheduler(optimizer, t_initial=total_steps, t_in_epochs=False)


def _multistep(optimizer: torch.optim.Optimizer, milestones: Sequence[int]) -> Scheduler:
    """Divide the learning rate by 10 from each of these steps on."""
    one_later = [milestone + 1 for milestone in milestones]  # timm's take effect one step early
    return MultiStepLRScheduler(optimizer, one_later, decay_rate=0.1, t_in_epochs=False)
