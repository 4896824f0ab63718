"""Trains a classifier for an epoch, and evaluates one."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.common.sampler import DistributedBatchSampler
from benchmarks.accuracy.common.trainer import BaseTrainer, autocast
from simam.messages import UserError

from .datasets import LabelledImages

LOSS_INTERVAL = 50  # steps between two readings of the loss, each of which waits for the GPU


class Trainer(BaseTrainer):
    """Trains a classifier.

    Args:
        model (nn.Module): the network, on its device.
        optimizer (Optimizer): updates the network's parameters.
        scheduler (Scheduler): timm's, updated after every step.
        dist_context (DistributedContext): the processes that train together.
        data (Dataset): the training set.
        batches (DistributedBatchSampler): the order of the training set.
        amp (str): "none", "bfloat16" or "float16", the dtype of automatic mixed precision.
        channels_last (bool): memory layout of the images.
        ema (float or None): decay of the average of the weights; None keeps no average.
        workers (int): worker processes that load images.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        dist_context: DistributedContext,
        data: Dataset[Any],
        batches: DistributedBatchSampler,
        *,
        amp: str,
        channels_last: bool,
        ema: float | None,
        workers: int,
    ) -> None:
        self.ema = None if ema is None else ModelEmaV3(model, decay=ema)
        super().__init__(model, optimizer, dist_context, data, batches, amp=amp, workers=workers)
        self.scheduler, self.channels_last = scheduler, channels_last

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        average = {"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}
        return super().state_dict() | average

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.scheduler.step_update(self.step)
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])

    def epoch(self, number: int, total_steps: int) -> dict[str, float]:
        """Train for one epoch, or until the training has taken `total_steps` optimizer steps.

        Args:
            number (int): index of the epoch, from 0.
            total_steps (int): length of the whole training.

        Returns:
            dict of str to float: mean loss, and accuracy in percent, of the training images,
                each measured just before the step that learns from it.

        Raises:
            UserError: the loss is infinite or NaN.
        """
        self.parallel.train()
        self.batches.epoch = number
        sums = torch.zeros(3, dtype=torch.float64, device=self.dist_context.device)
        micro_batches = iter(self.loader)
        steps = min(self.batches.steps_per_epoch, total_steps - self.step)
        with tqdm(
            total=steps,
            desc=f"epoch {number + 1}",
            leave=False,
            disable=None if self.dist_context.is_primary else True,
        ) as bar:
            for done in range(1, steps + 1):
                for accumulation_step in range(self.accumulation_steps):
                    images, labels = next(micro_batches)
                    sums += self._forward_backward(images, labels, accumulation_step)
                self.optimizer_step()
                self.scheduler.step_update(self.step)
                if self.ema:
                    self.ema.update(self.model)
                bar.update()
                if done % LOSS_INTERVAL == 0 or done == steps:
                    bar.set_postfix(loss=f"{self._mean_loss(sums):.3f}")
        if self.dist_context.world_size > 1:
            distribute_bn(self.model, self.dist_context.world_size)
        loss, correct, count = self.dist_context.all_reduce_sum(sums).tolist()
        return {"train_loss": loss / count, "train_top1": 100 * correct / count}

    def _forward_backward(self, images: Tensor, labels: Tensor, accumulation_step: int) -> Tensor:
        """Add the gradients of a micro-batch; return its summed loss, hits and images."""
        images, labels = to_device(images, labels, self.dist_context.device, self.channels_last)
        with self.micro_batch(accumulation_step):
            with autocast(self.dist_context.device, self.amp):
                scores = self.parallel(images)
                if not isinstance(scores, Tensor):
                    raise UserError(
                        f"{type(self.model).__name__} returns a {type(scores).__name__} in "
                        "training; expected one tensor of scores, so name a model without "
                        "auxiliary heads"
                    )
                loss = F.cross_entropy(scores, labels)
            self.backward(loss)
        correct = (scores.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach() * len(labels), correct, correct.new_tensor(len(labels))])

    def _mean_loss(self, sums: Tensor) -> float:
        loss = (sums[0] / sums[2]).item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step}; lower --lr, or start from the last "
                "checkpoint with a new --output and --weights"
            )
        return loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: LabelledImages,
    dist_context: DistributedContext,
    *,
    batch_size: int,
    amp: str,
    channels_last: bool,
    workers: int,
) -> dict[str, float]:
    """Mean loss, and top-1 and top-5 accuracy in percent; every image counts once.

    Args:
        model (nn.Module): the network, on its device.
        data (Dataset): the test set, which is divided among the processes.
        dist_context (DistributedContext): the processes that evaluate together.
        batch_size (int): images per forward pass.
        amp (str): "none", "bfloat16" or "float16", the dtype of automatic mixed precision.
        channels_last (bool): memory layout of the images.
        workers (int): worker processes that load images.
    """
    share = Subset(data, range(dist_context.rank, len(data), dist_context.world_size))
    loader = DataLoader(share, batch_size, num_workers=workers)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=dist_context.device)
    for images, labels in tqdm(
        loader, desc="test", leave=False, disable=None if dist_context.is_primary else True
    ):
        images, labels = to_device(images, labels, dist_context.device, channels_last)
        with autocast(dist_context.device, amp):
            scores = model(images)
        scores = scores.float()
        hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        sums[0] += F.cross_entropy(scores, labels, reduction="sum")
        sums[1] += hits[:, 0].sum()
        sums[2] += hits.sum()
    loss, top1, top5 = (dist_context.all_reduce_sum(sums) / len(data)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def to_device(
    images: Tensor, labels: Tensor, device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Copy a batch to the device, with images in the network's memory layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    return images, labels.to(device, non_blocking=True)
