"""Which neurons affect which gates, and the groups of neurons that follow from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import probes
from .subject import Subject

Axes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The neurons whose values affect a gate, as a block of neighbours along each axis.

    Attributes:
        blocks (tuple of int): the length of the block along each axis; 1 is the neuron alone.
        full (tuple of bool): whether the block is the whole axis.
        regular (bool): whether the blocks tile the map. If not, they overlap, as windows do.
    """

    blocks: tuple[int, ...]
    full: tuple[bool, ...]
    regular: bool

    @property
    def axes(self) -> Axes:
        """The axes along which neurons affect each other."""
        return tuple(axis for axis, block in enumerate(self.blocks) if block > 1)

    def count(self, shape: Sequence[int], axes: Axes) -> int:
        """The number of neurons in a group."""
        return math.prod(shape[a] if self.full[a] else self.blocks[a] for a in axes)

    def group(self, x: Tensor, axes: Axes) -> Tensor:
        """Bring the blocks along some axes into the last dimension (Tensor[..., group])."""
        ordered, dims = self._ordered(x, axes)
        return ordered.flatten(dims)

    def reduce(self, function: Callable[[Tensor], Tensor], x: Tensor, axes: Axes) -> Tensor:
        """Give every neuron of x the value of a function of its group (Tensor[..., group])."""
        ordered, dims = self._ordered(x, axes)
        values = function(ordered.flatten(dims)).reshape(
            *ordered.shape[:dims], *[1] * (ordered.dim() - dims)
        )
        order = self._order(axes)
        back = [order.index(dim) for dim in range(ordered.dim())]
        return values.expand_as(ordered).permute(back).reshape(x.shape)

    def _ordered(self, x: Tensor, axes: Axes) -> tuple[Tensor, int]:
        split: list[int] = []
        for size, block, full in zip(x.shape, self.blocks, self.full, strict=True):
            length = size if full else block
            split += [size // length, length]
        return x.reshape(split).permute(self._order(axes)), len(split) - len(axes)

    def _order(self, axes: Axes) -> list[int]:
        inside = [2 * axis + 1 for axis in axes]
        return [d for d in range(2 * len(self.blocks)) if d not in inside] + inside


def run(subject: Subject, x: Tensor) -> Tensor:
    """Run the subject on x in its dtype; a smaller output is expanded (Tensor like x, float64)."""
    return subject(x.to(subject.dtype)).double().expand_as(x)


def is_product(subject: Subject) -> bool:
    """Return whether the output is 0 where the input is 0."""
    x = probes.pattern(subject.shape)
    zero = (torch.arange(x.numel()) % 5 == 0).reshape(x.shape)
    return bool((run(subject, x.masked_fill(zero, 0.0))[zero] == 0).all())


def affected(
    subject: Subject, gate: Callable[[Tensor, Tensor], Tensor], precision: float
) -> Layout:
    """Change one neuron, and see whose gates change.

    Args:
        subject (Subject): the module.
        gate (callable): computes gates from x and the output.
        precision (float): the relative error of the gates.
    """
    y = probes.pattern(subject.shape)
    index = tuple(size // 2 for size in subject.shape)
    differs = torch.zeros_like(y, dtype=torch.bool)
    differs[index] = True
    for size in probes.SIZES:
        changed = y.clone()
        changed[index] += 0.5
        before, after = (gate(size * each, run(subject, size * each)) for each in (y, changed))
        differs |= (before - after).abs() > 20 * precision * (1 + before.abs())
    blocks, full, regular = [], [], True
    for axis, size in enumerate(subject.shape):
        others = [dim for dim in range(y.dim()) if dim != axis]
        indices = differs.any(dim=others).nonzero().flatten().tolist()
        length = indices[-1] - indices[0] + 1
        blocks.append(length)
        full.append(length == size and size > 1)
        regular &= indices[0] % length == 0 and size % length == 0
    return Layout(tuple(blocks), tuple(full), regular)
