"""The processes that train together, one or those that torchrun started."""

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
    """This process among those that train together.

    Attributes:
        rank (int): its number; the first, 0, alone prints and writes.
        size (int): how many there are.
        device (torch.device): what it computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_primary(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def distributed_context(device: str | None = None) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, by NCCL on GPUs and by gloo elsewhere.

    Args:
        device (str, optional): "cpu" or "cuda"; by default a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device: expected cpu or cuda, got {device!r}") from error
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    found = SimpleNamespace(device=device)
    init_distributed_device(found)
    try:
        yield DistributedContext(found.rank, found.world_size, torch.device(found.device))
    finally:
        if found.distributed:
            dist.destroy_process_group()
