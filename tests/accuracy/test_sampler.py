"""Random numbers by place: what is drawn depends on nothing that was drawn before."""

import importlib
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("timm", reason="the scripts need timm")
seeds = importlib.import_module("benchmarks.accuracy.common.sampler")


class Draws(Dataset):
    """Items that are random in every way that transforms are."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), torch.rand(()).item(), np.random.rand()


def items(workers: int, epochs: list[int], **options: int) -> list[list[list[float]]]:
    batches = seeds.DistributedBatchSampler(12, 4, 5, **options)
    loader = DataLoader(
        seeds.SeededDataset(Draws(), 5),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    found = []
    for epoch in epochs:
        batches.epoch = epoch
        found.append([torch.stack(batch, 1).tolist() for batch in loader])
    return found


def test_neither_workers_nor_history_change_an_epoch() -> None:
    expected = items(0, [0, 1, 2])
    assert items(2, [0, 1, 2]) == expected
    assert items(0, [2]) == expected[2:]
    flat = [tuple(item[1:]) for epoch in expected for batch in epoch for item in batch]
    assert len(set(flat)) == 3 * 12  # no item draws what another one does, nor does an epoch
    columns = zip(*flat, strict=True)
    assert all(len(set(column)) == 3 * 12 for column in columns)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 1)])
def test_parts_make_up_the_same_batches(processes: int, accumulate: int) -> None:
    whole = list(seeds.DistributedBatchSampler(23, 8, 1))
    assert len(whole) == 2
    assert len({index for batch in whole for _, index in batch}) == 16
    parts = [
        list(
            seeds.DistributedBatchSampler(
                23, 8, 1, rank=rank, world_size=processes, accumulation_steps=accumulate
            )
        )
        for rank in range(processes)
    ]
    for step, batch in enumerate(whole):
        # In the order in which one process would take them.
        turns = range(step * accumulate, (step + 1) * accumulate)
        joined = [item for turn in turns for rank in parts for item in rank[turn]]
        assert joined == batch
    assert {len(part) for rank in parts for part in rank} == {8 // processes // accumulate}


def test_order_depends_on_seed_and_epoch() -> None:
    def order(number: int, epoch: int) -> list[int]:
        batches = seeds.DistributedBatchSampler(100, 100, number)
        batches.epoch = epoch
        return [index for batch in batches for _, index in batch]

    orders = [order(number, epoch) for number in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert order(1, 1) == orders[-1]
