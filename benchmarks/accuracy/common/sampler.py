"""Random numbers that depend on where they are drawn, and on nothing that came before.

What an image is turned into depends on the seed, the epoch and the image; what dropout drops, on
the seed and the step. So a run that goes on from a checkpoint draws what it would have drawn, and
the number of workers changes nothing.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


def seed(*place: int) -> None:
    """Seed all generators of this process by a place: (seed, epoch, image), for instance."""
    numbers = np.random.SeedSequence(place).generate_state(2)
    first, second = map(int, numbers)
    # Not torch.manual_seed: for an image, asking every kind of device takes longer than the crop.
    torch.default_generator.manual_seed((first << 32) + second)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all((first << 32) + second)
    random.seed(first)
    np.random.seed(second)  # libraries of transforms draw from it


class SeededDataset(Dataset):
    """A dataset whose random changes to an item depend on the seed, the epoch and the item.

    Args:
        data (Dataset): the items.
        number (int): the seed.
    """

    def __init__(self, data: Dataset, number: int) -> None:
        self.data, self.number = data, number

    def __getitem__(self, place: tuple[int, int]) -> object:
        epoch, index = place
        seed(self.number, epoch, index)
        return self.data[index]


class DistributedBatchSampler(Sampler[list[tuple[int, int]]]):
    """This process's part of every batch of an epoch, as (epoch, index).

    The items are mixed by seed and epoch and cut into batches; what is left over at the end waits
    for another epoch. A batch is cut into as many parts as there are processes times
    accumulations, so that it holds the same items however many there are of each.

    Args:
        items (int): number of items.
        batch (int): items in a batch, in all processes together.
        number (int): the seed.
        rank (int): number of this process.
        processes (int): how many there are.
        accumulate (int): parts of a batch that a process takes one after the other.
    """

    def __init__(
        self,
        items: int,
        batch: int,
        number: int,
        *,
        rank: int = 0,
        processes: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.items, self.batch, self.number = items, batch, number
        self.rank, self.processes, self.accumulate = rank, processes, accumulate
        self.part = batch // (processes * accumulate)
        self.epoch = 0

    @property
    def steps(self) -> int:
        """DistributedBatchSampler in an epoch."""
        return self.items // self.batch

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.number, self.epoch)).permutation(self.items).tolist()
        for step in range(self.steps):
            for turn in range(self.accumulate):
                start = step * self.batch + (turn * self.processes + self.rank) * self.part
                yield [(self.epoch, index) for index in order[start : start + self.part]]
