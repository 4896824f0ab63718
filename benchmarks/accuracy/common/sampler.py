"""Random numbers that depend on a key such as (seed, epoch, index), not on earlier draws.

The augmentation of an item depends on the seed, the epoch and the item; dropout depends on the seed
and the step. A resumed run therefore draws the same numbers as an uninterrupted one, and the number
of workers changes nothing.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


def seed_everything(*seed_key: int) -> None:
    """Seed the random generators of torch, Python and NumPy from a key of several integers.

    Args:
        seed_key (int): for instance seed, epoch and index of an item.
    """
    numbers = np.random.SeedSequence(seed_key).generate_state(2)
    first, second = map(int, numbers)
    # torch.manual_seed also seeds every kind of device, which takes longer than cropping an image.
    torch.default_generator.manual_seed((first << 32) + second)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all((first << 32) + second)
    random.seed(first)
    np.random.seed(second)  # some transforms draw from NumPy


class SeededDataset(Dataset[Any]):
    """A dataset whose augmentation depends only on the seed, the epoch and the item.

    Its index is a pair (epoch, index), as `DistributedBatchSampler` yields it.

    Args:
        data (Dataset): the items.
        seed (int): the seed of the run.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_everything(self.seed, epoch, index)
        return self.data[index]


class DistributedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields this process's micro-batches of an epoch, as lists of (epoch, index).

    Seed and epoch determine a permutation of the items, which is cut into batches. The remainder,
    smaller than a batch, is dropped. Each batch is split evenly over processes and accumulation
    steps, so a batch holds the same items whatever their numbers.

    Args:
        items (int): number of items.
        batch_size (int): items per optimizer step, over all processes.
        seed (int): the seed of the run.
        rank (int): index of this process.
        world_size (int): number of processes.
        accumulation_steps (int): micro-batches per optimizer step in each process.

    Attributes:
        micro_batch_size (int): items in each micro-batch.
        epoch (int): the epoch to iterate over; set it before each one.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.rank, self.world_size, self.accumulation_steps = rank, world_size, accumulation_steps
        self.micro_batch_size = batch_size // (world_size * accumulation_steps)
        self.epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.items // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.items).tolist()
        size = self.micro_batch_size
        for step in range(self.steps_per_epoch):
            for accumulation_step in range(self.accumulation_steps):
                part = accumulation_step * self.world_size + self.rank
                start = step * self.batch_size + part * size
                yield [(self.epoch, index) for index in order[start : start + size]]
