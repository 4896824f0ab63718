"""Seeded sampling: what is drawn depends on its key, not on earlier draws."""

import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

np = pytest.importorskip("numpy", reason="the sampler draws from numpy")

from benchmarks.accuracy.common.sampler import DistributedBatchSampler, SeededDataset


class Draws(Dataset):
    """Items that draw from every random generator that transforms use."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), torch.rand(()).item(), np.random.rand()


def draw(workers: int, epochs: list[int], **options: int) -> list[list[list[float]]]:
    batches = DistributedBatchSampler(12, 4, 5, **options)
    loader = DataLoader(
        SeededDataset(Draws(), 5),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    found = []
    for epoch in epochs:
        batches.epoch = epoch
        found.append([torch.stack(batch, 1).tolist() for batch in loader])
    return found


def test_seeded_dataset_ignores_workers_and_earlier_epochs() -> None:
    expected = draw(0, [0, 1, 2])
    assert draw(2, [0, 1, 2]) == expected
    assert draw(0, [2]) == expected[2:]
    flat = [tuple(item[1:]) for epoch in expected for batch in epoch for item in batch]
    assert len(set(flat)) == 3 * 12  # every item of every epoch draws other numbers
    columns = zip(*flat, strict=True)
    assert all(len(set(column)) == 3 * 12 for column in columns)


@pytest.mark.parametrize(
    ("world_size", "accumulation_steps"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 1)]
)
def test_batch_sampler_splits_batches_over_processes_and_accumulation(
    world_size: int, accumulation_steps: int
) -> None:
    whole = list(DistributedBatchSampler(23, 8, 1))
    assert len(whole) == 2
    assert len({index for batch in whole for _, index in batch}) == 16
    micro_batches = [
        list(
            DistributedBatchSampler(
                23, 8, 1, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps
            )
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        # In the order of a single process.
        indices = range(step * accumulation_steps, (step + 1) * accumulation_steps)
        joined = [item for index in indices for rank in micro_batches for item in rank[index]]
        assert joined == batch
    sizes = {len(micro_batch) for rank in micro_batches for micro_batch in rank}
    assert sizes == {8 // world_size // accumulation_steps}


def test_batch_sampler_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = DistributedBatchSampler(100, 100, seed)
        batches.epoch = epoch
        return [index for batch in batches for _, index in batch]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert order(1, 1) == orders[-1]
