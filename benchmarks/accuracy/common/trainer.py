"""The training step shared by classification and detection.

It handles gradient accumulation, several devices and mixed precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from .distributed import DistributedContext
from .sampler import DistributedBatchSampler, SeededDataset, seed_everything


class BaseTrainer:
    """A network and everything that changes with it from step to step.

    Args:
        model (nn.Module): the network, on its device.
        optimizer (Optimizer): updates the network's parameters.
        dist_context (DistributedContext): the processes that train together.
        data (Dataset): the training set.
        batches (DistributedBatchSampler): the order of the training set.
        amp (str): "none", "bfloat16" or "float16", the dtype of automatic mixed precision.
        workers (int): worker processes that load data.
        collate (callable, optional): merges a list of items into a batch; by default torch's.

    Attributes:
        accumulation_steps (int): micro-batches per optimizer step in this process.
        parallel (nn.Module): the network, wrapped in DistributedDataParallel if there are several
            processes.
        step (int): optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dist_context: DistributedContext,
        data: Dataset[Any],
        batches: DistributedBatchSampler,
        *,
        amp: str,
        workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.dist_context, self.batches, self.amp = dist_context, batches, amp
        self.accumulation_steps = batches.accumulation_steps
        self.step = 0
        device = dist_context.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=amp == "float16")
        self.loader = DataLoader(
            SeededDataset(data, batches.seed),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
            collate_fn=collate,
        )
        distributed = dist_context.world_size > 1
        self.parallel = DistributedDataParallel(model) if distributed else model

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    @contextmanager
    def micro_batch(self, accumulation_step: int) -> Iterator[None]:
        """Run forward and backward of one micro-batch inside this context.

        Processes exchange gradients only in the last micro-batch of an optimizer step.

        Args:
            accumulation_step (int): index of the micro-batch within the optimizer step.
        """
        # The forward pass is random: dropout, and the regions that a detector samples.
        part = accumulation_step * self.dist_context.world_size + self.dist_context.rank
        seed_everything(self.batches.seed, self.step, part)
        is_last = accumulation_step == self.accumulation_steps - 1
        if isinstance(self.parallel, DistributedDataParallel) and not is_last:
            with self.parallel.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss to those of the optimizer step."""
        self.scaler.scale(loss / self.accumulation_steps).backward()

    def optimizer_step(self) -> None:
        """Update the weights and clear the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Automatic mixed precision in the dtype `amp`; disabled if it is "none"."""
    dtype = None if amp == "none" else getattr(torch, amp)
    return torch.autocast(device.type, dtype, enabled=amp != "none")
