"""Hypothesis strategies for feature maps."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3, 1e6)
KINDS = ("normal", "outlier", "signs", "constant")
LAYOUTS = ("contiguous", "permuted", "sliced", "expanded")

# Log-uniform, because the ratio of lambda to the variance matters.
lambdas = st.floats(-8, 1).map(lambda power: 10.0**power)

# Maps of rank 3 to 6. They are small, because the oracles loop over pairs of neurons.
spatial_sizes = st.one_of(
    st.lists(st.integers(1, 7), min_size=1, max_size=2),
    st.lists(st.integers(1, 3), min_size=3, max_size=4),
)


@st.composite
def maps(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES[:2],
    scales: tuple[float, ...] = SCALES,
    offsets: tuple[float, ...] = (0.0, 1.0, -1e3),
    kinds: tuple[str, ...] = KINDS,
    layouts: tuple[str, ...] = LAYOUTS,
    min_positions: int = 1,
) -> Tensor:
    """Draw a map on the CPU: scale * (deviations + offset)."""
    sizes = draw(spatial_sizes.filter(lambda sizes: math.prod(sizes) >= min_positions))
    shape = [draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes]
    dtype = draw(st.sampled_from(dtypes))
    deviations = _deviations(draw(st.sampled_from(kinds)), shape, draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from(scales)) * (deviations + draw(st.sampled_from(offsets)))
    limit = torch.finfo(dtype).max
    return _lay_out(draw, draw(st.sampled_from(layouts)), values.clamp(-limit, limit).to(dtype))


@st.composite
def integer_maps(draw: st.DrawFn, min_positions: int = 1) -> Tensor:
    """Draw a map of small integers, which can be shifted and scaled without rounding."""
    x = draw(maps(scales=(8.0,), offsets=(0.0,), min_positions=min_positions))
    return x.round()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to a device with its strides; `Tensor.to` changes those of sliced or expanded x."""
    length = x.untyped_storage().nbytes() // x.element_size()
    storage = x.as_strided((length,), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _deviations(kind: str, shape: list[int], seed: int) -> Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "normal":
        return normal
    if kind == "signs":
        return normal.sign()
    flat = torch.zeros_like(normal).flatten(2)
    if kind == "outlier":
        # The other neurons have no variance, which leave-one-out computes by cancellation.
        flat[..., seed % flat.shape[2]] = normal.flatten(2)[..., 0]
    return flat.reshape(shape)


def _lay_out(draw: st.DrawFn, layout: str, x: Tensor) -> Tensor:
    if layout == "permuted":
        order = draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if layout == "sliced":
        dim = draw(st.integers(0, x.dim() - 1))
        poison = torch.full_like(x, math.nan)
        return torch.stack([poison, x], dim + 1).select(dim + 1, 1)
    if layout == "expanded":
        dim = draw(st.integers(0, x.dim() - 1))
        return x.narrow(dim, 0, 1).expand(x.shape)
    return x
