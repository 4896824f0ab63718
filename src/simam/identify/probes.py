"""The inputs on which a module is run, always the same."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SCALES = tuple(10 ** (power / 2) for power in range(-14, 11))
SIZES = (10.0, 0.3, 0.01)  # a few of them
_NEAR_ZERO = 0.05


def pattern(shape: Sequence[int]) -> Tensor:
    """Make a map on which deviations of a formula show (Tensor[shape], float64).

    Channels differ in mean and variance, the distribution is skewed, one neuron of a channel stands
    far out, and no value is near 0, so that the gate can be computed as output / x.
    """
    generator = torch.Generator().manual_seed(0)
    lead = (*shape[:2], *[1] * (len(shape) - 2))

    def uniform(shape: Sequence[int]) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    y = torch.randn(*shape, generator=generator, dtype=torch.float64)
    y = y + 0.3 * y * y
    y.flatten(2)[..., math.prod(shape[2:]) // 2] += 6
    y = y * (0.5 + 1.5 * uniform(lead)) + 3 * uniform(lead) - 1.5
    return torch.where(y.abs() < _NEAR_ZERO, _NEAR_ZERO, y)


def varied(shape: Sequence[int], e_lambda: float) -> Iterator[Tensor]:
    """Maps of several kinds, with variances from far below lambda to far above (float64)."""
    y = pattern(shape)
    first = y.flatten(2)[..., :1].reshape(*y.shape[:2], *[1] * (y.dim() - 2))
    constant = first.expand_as(y).contiguous()
    outlier = constant.clone()
    outlier.flatten(2)[..., 0] += 1
    root = math.sqrt(e_lambda)
    for scale in (0.01 * root, 0.3 * root, root, 10 * root, 1e3 * root, 1.0):
        for each in (y, -y, y + 30, constant, outlier, y.sign()):
            yield scale * each


def sizes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Other shapes of the same rank, of one element up to a few hundred per channel."""
    batch, channels = shape[:2]
    free = len(shape) - 2
    maps = [(4, 9), (6, 1), (1, 6), (2, 2), (1, 2), (3, 3), (16, 20), (5, 7)]
    spatial = [(*[1] * (free - 2), *m) if free >= 2 else (m[0] * m[1],) for m in maps]
    if free == 3:
        spatial += [(3, 2, 4), (4, 1, 1)]
    return [
        *((batch, channels, *s) for s in spatial),
        (1, channels, *spatial[0]),
        (3, 1, *spatial[0]),
        (1, 1, *spatial[0]),
        (batch, 2 * channels, *spatial[0]),
        (1, 1, *spatial[6]),
    ]
