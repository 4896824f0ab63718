"""Steps of a training, whatever is trained: in parts, on several devices, in mixed precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from .distributed import DistributedContext
from .sampler import DistributedBatchSampler, SeededDataset, seed


class BaseTrainer:
    """A network and all that changes with it from step to step.

    Args:
        model (nn.Module): the network, on its device.
        optimizer (Optimizer): of its parameters.
        dist_context (DistributedContext): that train together.
        data (Dataset): what is trained on.
        batches (DistributedBatchSampler): in which order.
        amp (str): "none", or the dtype of what autocast computes.
        workers (int): processes that prepare images.
        collate (callable, optional): makes a batch of a list of items; torch's if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dist_context: DistributedContext,
        data: Dataset,
        batches: DistributedBatchSampler,
        *,
        amp: str,
        workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.dist_context, self.batches, self.amp = dist_context, batches, amp
        self.step = 0
        device = dist_context.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=amp == "float16")
        self.loader = DataLoader(
            SeededDataset(data, batches.number),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
            collate_fn=collate,
        )
        self.parallel = DistributedDataParallel(model) if dist_context.size > 1 else model

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
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

    @contextmanager
    def part(self, turn: int) -> Iterator[None]:
        """A part of a step, forward and backward; devices exchange gradients in the last alone."""
        size = self.dist_context.size
        # Dropout draws, and so does a detector, which learns from some regions among many.
        seed(self.batches.number, self.step, turn * size + self.dist_context.rank)
        waits = size > 1 and turn < self.batches.accumulate - 1
        with self.parallel.no_sync() if waits else nullcontext():
            yield

    def add_gradients(self, loss: Tensor) -> None:
        """Add those of the mean loss of a part to those of the step."""
        self.scaler.scale(loss / self.batches.accumulate).backward()

    def update(self) -> None:
        """End a step: change the weights."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Automatic mixed precision, or none."""
    dtype = None if amp == "none" else getattr(torch, amp)
    return torch.autocast(device.type, dtype, enabled=amp != "none")
