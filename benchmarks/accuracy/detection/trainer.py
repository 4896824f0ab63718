"""Trains a detector for one epoch at a time."""

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
    """Trains a detector by a recipe.

    Args:
        model (nn.Module): a detector of torchvision, on its device.
        recipe (Recipe): the hyperparameters.
        dist_context (DistributedContext): the processes that train together.
        data (Dataset): images and their targets.
        batches (DistributedBatchSampler): the order of the data.
        amp (str): "none", "bfloat16" or "float16", the dtype of automatic mixed precision.
        workers (int): worker processes that load data.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        dist_context: DistributedContext,
        data: Dataset[tuple[Tensor, dict[str, Tensor]]],
        batches: DistributedBatchSampler,
        *,
        amp: str = "none",
        workers: int = 0,
    ) -> None:
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.learning_rate(0, batches.steps_per_epoch),
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
            dict of str to float: the mean of each loss; "loss" is their sum, which is minimised.

        Raises:
            UserError: the loss is not finite.
        """
        self.parallel.train()
        steps, world_size = self.batches.steps_per_epoch, self.dist_context.world_size
        self.batches.epoch = epoch = self.step // steps
        sums: dict[str, Tensor] = {}
        micro_batches = iter(self.loader)
        # None shows the progress bar only on a terminal.
        disable = None if self.dist_context.is_primary else True
        for _ in tqdm(range(steps), f"epoch {epoch + 1}", leave=False, disable=disable):
            rate = self.recipe.learning_rate(self.step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for accumulation_step in range(self.accumulation_steps):
                losses = self._accumulate(next(micro_batches), accumulation_step)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.double()
            self.optimizer_step()
        if world_size > 1:
            # Running statistics differ, as each process saw other images; keep the primary's.
            distribute_bn(self.model, world_size)
        means = self.dist_context.all_reduce_sum(torch.stack(list(sums.values())))
        means /= steps * self.accumulation_steps * world_size
        return dict(zip(sums, means.tolist(), strict=True))

    def _accumulate(
        self, examples: list[tuple[Tensor, dict[str, Tensor]]], accumulation_step: int
    ) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to those of the optimizer step; return its losses."""
        device = self.dist_context.device
        images = [image.to(device) for image, _ in examples]
        targets = [{name: t.to(device) for name, t in target.items()} for _, target in examples]
        with self.micro_batch(accumulation_step):
            with autocast(device, self.amp):
                losses = self.parallel(images, targets)
                loss = sum(losses.values())
            if not loss.isfinite():
                values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step} ({values}); lower --lr, or "
                    "train with --amp none or bfloat16"
                )
            self.backward(loss)
        return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}
