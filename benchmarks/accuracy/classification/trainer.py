"""The training of a classifier, and how good it is."""

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

LOOK = 50  # steps between two looks at the loss, for each of which a GPU has to wait


class Trainer(BaseTrainer):
    """A classifier in training.

    Args:
        model (nn.Module): the network, on its device.
        optimizer (Optimizer): of its parameters.
        scheduler (Scheduler): timm's, counting steps.
        dist_context (DistributedContext): that train together.
        data (Dataset): what is trained on.
        batches (DistributedBatchSampler): in which order.
        amp (str): "none", or the dtype of what autocast computes.
        channels_last (bool): layout of the images.
        ema (float or None): decay of the average of the weights; none: there is no average.
        workers (int): processes that prepare images.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        dist_context: DistributedContext,
        data: Dataset,
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
        averaged = {"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}
        return super().state_dict() | averaged

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.scheduler.step_update(self.step)
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])

    def epoch(self, number: int, steps: int) -> dict[str, float]:
        """Train for an epoch, or to the end of so many steps in all.

        Returns:
            dict of str to float: mean loss, and accuracy in percent, on the batches as they came.

        Raises:
            UserError: the loss is no number any more.
        """
        self.parallel.train()
        self.batches.epoch = number
        sums = torch.zeros(3, dtype=torch.float64, device=self.dist_context.device)
        turns, accumulate = iter(self.loader), self.accumulation_steps
        some = min(self.batches.steps_per_epoch, steps - self.step)
        with tqdm(
            total=some,
            desc=f"epoch {number + 1}",
            leave=False,
            disable=None if self.dist_context.is_primary else True,
        ) as bar:
            for done in range(1, some + 1):
                sums += sum(self._turn(*next(turns), turn) for turn in range(accumulate))
                self.optimizer_step()
                self.scheduler.step_update(self.step)
                if self.ema:
                    self.ema.update(self.model)
                bar.update()
                if done % LOOK == 0 or done == some:
                    bar.set_postfix(loss=f"{self._mean_loss(sums):.3f}")
        if self.dist_context.world_size > 1:
            distribute_bn(self.model, self.dist_context.world_size)
        loss, right, images = self.dist_context.all_reduce_sum(sums).tolist()
        return {"train_loss": loss / images, "train_top1": 100 * right / images}

    def _turn(self, images: Tensor, labels: Tensor, turn: int) -> Tensor:
        """Add the gradients of a part of a batch; its loss, hits and images."""
        images, labels = place(images, labels, self.dist_context.device, self.channels_last)
        with self.micro_batch(turn):
            with autocast(self.dist_context.device, self.amp):
                scores = self.parallel(images)
                if not isinstance(scores, Tensor):
                    raise UserError(
                        f"{type(self.model).__name__} returns a {type(scores).__name__} in "
                        "training; expected scores alone, so name a model without auxiliary heads"
                    )
                loss = F.cross_entropy(scores, labels)
            self.backward(loss)
        right = (scores.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach() * len(labels), right, right.new_tensor(len(labels))])

    def _mean_loss(self, sums: Tensor) -> float:
        loss = (sums[0] / sums[2]).item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step}; lower --lr, or go on from the last "
                "checkpoint with a new --output and --weights"
            )
        return loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    dist_context: DistributedContext,
    *,
    batch: int,
    amp: str,
    channels_last: bool,
    workers: int,
) -> dict[str, float]:
    """Mean loss, and top-1 and top-5 accuracy in percent; every image counts once.

    Args:
        model (nn.Module): the network, on its device.
        data (Dataset): (image, class); each process takes its share.
        dist_context (DistributedContext): that evaluate together.
        batch (int): images at a time.
        amp (str): as for training.
        channels_last (bool): as for training.
        workers (int): processes that prepare images.
    """
    share = Subset(data, range(dist_context.rank, len(data), dist_context.world_size))
    loader = DataLoader(share, batch, num_workers=workers)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=dist_context.device)
    for images, labels in tqdm(
        loader, desc="test", leave=False, disable=None if dist_context.is_primary else True
    ):
        images, labels = place(images, labels, dist_context.device, channels_last)
        with autocast(dist_context.device, amp):
            scores = model(images)
        scores = scores.float()
        best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        sums[0] += F.cross_entropy(scores, labels, reduction="sum")
        sums[1] += best[:, 0].sum()
        sums[2] += best.sum()
    loss, top1, top5 = (dist_context.all_reduce_sum(sums) / len(data)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def place(
    images: Tensor, labels: Tensor, device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """A batch on the device, in the layout of the network."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    return images, labels.to(device, non_blocking=True)
