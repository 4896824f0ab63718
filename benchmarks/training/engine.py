"""The steps of a training, and how good a network is."""

import math
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from simam.zoo import UserError

from .distributed import Processes
from .seeds import Batches, Seeded, seed

LOOK = 50  # steps between two looks at the loss, for each of which a GPU has to wait


class Trainer:
    """A network in training: what changes from step to step, and how.

    Args:
        model (nn.Module): the network, on its device.
        optimizer (Optimizer): of its parameters.
        scheduler (Scheduler): timm's, counting steps.
        processes (Processes): that train together.
        data (Dataset): what is trained on.
        batches (Batches): in which order.
        number (int): the seed.
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
        processes: Processes,
        data: Dataset,
        batches: Batches,
        *,
        number: int,
        amp: str,
        channels_last: bool,
        ema: float | None,
        workers: int,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.processes, self.batches, self.number = processes, batches, number
        self.amp, self.channels_last = amp, channels_last
        self.ema = None if ema is None else ModelEmaV3(model, decay=ema)
        self.step = 0
        device = processes.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=amp == "float16")
        self.loader = DataLoader(
            Seeded(data, number),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
        )
        self.parallel = DistributedDataParallel(model) if processes.size > 1 else model

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        averaged = {"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}
        return averaged | {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
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
        sums = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        turns, accumulate = iter(self.loader), self.batches.accumulate
        some = min(self.batches.steps, steps - self.step)
        with tqdm(
            total=some,
            desc=f"epoch {number + 1}",
            leave=False,
            disable=None if self.processes.first else True,
        ) as bar:
            for done in range(1, some + 1):
                sums += sum(self._turn(*next(turns), turn) for turn in range(accumulate))
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.step += 1
                self.scheduler.step_update(self.step)
                if self.ema:
                    self.ema.update(self.model)
                bar.update()
                if done % LOOK == 0 or done == some:
                    bar.set_postfix(loss=f"{self._mean_loss(sums):.3f}")
        if self.processes.size > 1:
            distribute_bn(self.model, self.processes.size)
        loss, right, images = self.processes.total(sums).tolist()
        return {"train_loss": loss / images, "train_top1": 100 * right / images}

    def _turn(self, images: Tensor, labels: Tensor, turn: int) -> Tensor:
        """Add the gradients of a part of a batch; its loss, hits and images."""
        images, labels = place(images, labels, self.processes.device, self.channels_last)
        parts = self.batches.accumulate
        seed(self.number, self.step, turn * self.processes.size + self.processes.rank)
        with ExitStack() as stack:
            if turn < parts - 1 and self.processes.size > 1:
                stack.enter_context(self.parallel.no_sync())
            with autocast(self.processes.device, self.amp):
                scores = self.parallel(images)
                if not isinstance(scores, Tensor):
                    raise UserError(
                        f"{type(self.model).__name__} returns a {type(scores).__name__} in "
                        "training; expected scores alone, so name a model without auxiliary heads"
                    )
                loss = F.cross_entropy(scores, labels)
            self.scaler.scale(loss / parts).backward()
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
    processes: Processes,
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
        processes (Processes): that evaluate together.
        batch (int): images at a time.
        amp (str): as for training.
        channels_last (bool): as for training.
        workers (int): processes that prepare images.
    """
    share = Subset(data, range(processes.rank, len(data), processes.size))
    loader = DataLoader(share, batch, num_workers=workers)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
    for images, labels in tqdm(
        loader, desc="test", leave=False, disable=None if processes.first else True
    ):
        images, labels = place(images, labels, processes.device, channels_last)
        with autocast(processes.device, amp):
            scores = model(images)
        scores = scores.float()
        best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        sums[0] += F.cross_entropy(scores, labels, reduction="sum")
        sums[1] += best[:, 0].sum()
        sums[2] += best.sum()
    loss, top1, top5 = (processes.total(sums) / len(data)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def place(
    images: Tensor, labels: Tensor, device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """A batch on the device, in the layout of the network."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    return images, labels.to(device, non_blocking=True)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Automatic mixed precision, or none."""
    dtype = None if amp == "none" else getattr(torch, amp)
    return torch.autocast(device.type, dtype, enabled=amp != "none")
