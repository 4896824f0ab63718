"""The training of a detector."""

from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.common.sampler import DistributedBatchSampler
from benchmarks.accuracy.common.trainer import BaseTrainer, autocast
from simam.messages import UserError

from .recipes import Recipe


class Trainer(BaseTrainer):
    """A detector in training.

    Args:
        model (nn.Module): a detector of torchvision, on its device.
        recipe (Recipe): the numbers.
        dist_context (DistributedContext): that train together.
        data (Dataset): images and targets.
        batches (DistributedBatchSampler): in which order.
        amp (str): "none", or the dtype of what autocast computes.
        workers (int): processes that prepare images.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        dist_context: DistributedContext,
        data: Dataset,
        batches: DistributedBatchSampler,
        *,
        amp: str = "none",
        workers: int = 0,
    ) -> None:
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.rate(0, batches.steps_per_epoch),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        super().__init__(
            model, optimizer, dist_context, data, batches, amp=amp, workers=workers, collate=list
        )
        self.recipe = recipe

    def epoch(self) -> dict[str, float]:
        """Train for one epoch.

        Returns:
            dict of str to float: mean losses; "loss" is their sum, which is what falls.

        Raises:
            UserError: the loss is no number any more.
        """
        self.parallel.train()
        steps, parts = self.batches.steps_per_epoch, self.accumulation_steps
        self.batches.epoch = number = self.step // steps
        sums: dict[str, Tensor] = {}
        turns = iter(self.loader)
        quiet = None if self.dist_context.is_primary else True  # none: unless there is no terminal
        for _ in tqdm(range(steps), f"epoch {number + 1}", leave=False, disable=quiet):
            rate = self.recipe.rate(self.step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for turn in range(parts):
                for name, loss in self._turn(next(turns), turn).items():
                    sums[name] = sums.get(name, 0) + loss.double()
            self.optimizer_step()
        if self.dist_context.world_size > 1:  # each has seen other images; the first one's are kept
            distribute_bn(self.model, self.dist_context.world_size)
        values = self.dist_context.all_reduce_sum(torch.stack(list(sums.values())))
        values = values / (steps * parts * self.dist_context.world_size)
        return dict(zip(sums, values.tolist(), strict=True))

    def _turn(self, examples: list[tuple[Tensor, dict[str, Tensor]]], turn: int) -> dict[str, Any]:
        """Add the gradients of a part of a batch; its losses."""
        device = self.dist_context.device
        images = [image.to(device) for image, _ in examples]
        targets = [{name: t.to(device) for name, t in target.items()} for _, target in examples]
        with self.micro_batch(turn):
            with autocast(device, self.amp):
                losses = self.parallel(images, targets)
                loss = sum(losses.values())
            if not loss.isfinite():
                each = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step} ({each}); lower --lr, or "
                    "train with --amp none or bfloat16"
                )
            self.backward(loss)
        return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}
