"""Layouts: values do not depend on strides, and dense strides are kept."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simam import functional as F
from tests.helpers.oracles import assert_close
from tests.helpers.strategies import DTYPES, lambdas, maps, to_device

pytestmark = pytest.mark.usefixtures("implementation")

FUNCTIONS = (F.simam, F.attention, F.energy)
STATISTICS = ("shared", "leave_one_out")


@given(
    x=maps(dtypes=DTYPES[:2], layouts=("permuted", "sliced", "expanded")),
    e_lambda=lambdas,
    function=st.sampled_from((F.simam, F.attention)),
    statistics=st.sampled_from(STATISTICS),
)
def test_functional_values_do_not_depend_on_strides(
    x: Tensor,
    e_lambda: float,
    function: Callable[..., Tensor],
    statistics: str,
    device: torch.device,
) -> None:
    x = to_device(x, device)
    clone = x.clone(memory_format=torch.contiguous_format)
    expected = function(clone, e_lambda, statistics=statistics)
    assert_close(function(x, e_lambda, statistics=statistics), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_functional_keeps_the_strides_of_dense_inputs(
    function: Callable[..., Tensor],
    statistics: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    for order in itertools.permutations(range(len(shape))):
        inverse = [order.index(i) for i in range(len(shape))]
        x = torch.ones(shape, dtype=dtype, device=device)
        x = x.permute(order).contiguous().permute(inverse)
        assert function(x, statistics=statistics).stride() == x.stride()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 4, 5), torch.channels_last),
        ((1, 3, 4, 5), torch.channels_last),  # one sample
        ((2, 1, 4, 5), torch.channels_last),  # one channel: also contiguous
        ((2, 3, 1, 1), torch.channels_last),  # one position: also contiguous
        ((2, 3, 1, 5), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
        ((1, 3, 4, 1, 6), torch.channels_last_3d),
    ],
)
def test_functional_keeps_channels_last(
    function: Callable[..., Tensor],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    x = torch.ones(shape, device=device).to(memory_format=memory_format)
    x.requires_grad_()
    output = function(x)
    # is_contiguous ignores the arbitrary stride of a dimension of size 1.
    assert output.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert gradient.is_contiguous(memory_format=memory_format)
