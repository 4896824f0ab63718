"""The processes that train together: one, or those that torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device
from torch import Tensor

from simam.messages import UserError


@dataclass(frozen=True)
class DistributedContext:
    """This process among the processes that train together.

    Attributes:
        rank (int): index of this process.
        world_size (int): number of processes.
        device (torch.device): where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def distributed_context(device: str | None = None) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started; they communicate by NCCL on GPUs, else by gloo.

    Args:
        device (str, optional): "cpu" or "cuda"; by default "cuda" if a GPU is available.

    Raises:
        UserError: the device is unknown or not available.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device: expected cpu or cuda, got {device!r}") from error
    if requested.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    process = SimpleNamespace(device=device)
    init_distributed_device(process)  # sets rank, world_size, distributed and the device's index
    try:
        yield DistributedContext(process.rank, process.world_size, torch.device(process.device))
    finally:
        if process.distributed:
            dist.destroy_process_group()
