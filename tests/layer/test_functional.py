"""simam, attention and energy: a worked example, edge cases, and refused inputs."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from simam import functional as F

pytestmark = pytest.mark.usefixtures("implementation")

FUNCTIONS = (F.simam, F.attention, F.energy)
STATISTICS = ("shared", "leave_one_out")

every_function = pytest.mark.parametrize("function", FUNCTIONS)
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)


# Computed by hand for the channel 0, 0, 0, 4 at lambda = 1. Shared: mean 1, variance 12 / 3.
# Leave-one-out: the other neurons of 4 are all 0; those of a 0 have mean 4/3 and variance 32/9.
@pytest.mark.parametrize(
    ("statistics", "zero", "four"),
    [
        ("shared", 1 / 20 + 1 / 2, 9 / 20 + 1 / 2),
        ("leave_one_out", 4 / 41 + 1 / 2, 16 / 4 + 1 / 2),
    ],
)
def test_functional_worked_example(
    statistics: str, zero: float, four: float, device: torch.device
) -> None:
    x = torch.tensor([[[0.0, 0.0, 0.0, 4.0]]], device=device)
    inverse = torch.tensor([[[zero, zero, zero, four]]], device=device)
    torch.testing.assert_close(F.energy(x, 1.0, statistics=statistics), 1 / inverse)
    torch.testing.assert_close(F.attention(x, 1.0, statistics=statistics), inverse.sigmoid())
    torch.testing.assert_close(F.simam(x, 1.0, statistics=statistics), x * inverse.sigmoid())


@every_function
def test_functional_defaults_are_the_authors(function: Callable[..., Tensor]) -> None:
    x = torch.linspace(-0.02, 0.03, 12).reshape(1, 1, 3, 4)
    assert torch.equal(function(x), function(x, 1e-4, statistics="shared"))
    assert not torch.equal(function(x), function(x, 1e-3))
    assert not torch.equal(function(x), function(x, statistics="leave_one_out"))


@both_statistics
@pytest.mark.parametrize("rank", [3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_functional_single_position_has_no_variance(
    statistics: str, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.full([2, 3] + [1] * (rank - 2), -7.0, dtype=dtype, device=device)
    gate = torch.full_like(x, 1 / (1 + math.exp(-0.5)))
    torch.testing.assert_close(F.energy(x, statistics=statistics), torch.full_like(x, 2.0))
    torch.testing.assert_close(F.attention(x, statistics=statistics), gate)
    torch.testing.assert_close(F.simam(x, statistics=statistics), x * gate)


@every_function
@both_statistics
@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 4, 5),  # an empty batch
        (2, 0, 4, 5),  # all channels pruned
        (0, 0, 1),
    ],
)
def test_functional_accepts_empty_batch_and_channels(
    function: Callable[..., Tensor], statistics: str, shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    output = function(x, statistics=statistics)
    assert output.shape == x.shape
    (gradient,) = torch.autograd.grad(output, x, torch.empty_like(x))
    assert gradient.shape == x.shape


@every_function
@both_statistics
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_functional_keeps_nan_and_inf_in_their_channel(
    function: Callable[..., Tensor], statistics: str, poison: float, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator).to(device)
    clean = function(x, statistics=statistics)
    x[1, 2, 3, 4] = poison
    output = function(x, statistics=statistics)
    assert output[1, 2].isnan().all()
    output[1, 2] = clean[1, 2]
    assert torch.equal(output, clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@both_statistics
def test_simam_gradient_keeps_nan_and_inf_in_their_channel(
    statistics: str, poison: float, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator).to(device)
    grad_output = torch.randn(3, 4, 5, 6, generator=generator).to(device)
    x[1, 2, 3, 4] = poison
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.simam(x, statistics=statistics), x, grad_output)
    finite = gradient.isfinite()
    assert not finite[1, 2].any()
    finite[1, 2] = True
    assert finite.all()


@every_function
def test_functional_leaves_the_input_unchanged(
    function: Callable[..., Tensor], device: torch.device
) -> None:
    x = torch.arange(24.0, device=device).reshape(1, 2, 3, 4)
    before = x.clone()
    output = function(x)
    assert torch.equal(x, before)
    assert output.data_ptr() != x.data_ptr()


@every_function
@pytest.mark.parametrize("x", [[[[0.0, 1.0]]], np.zeros((1, 2, 3, 4), dtype=np.float32), 1.0, None])
def test_functional_refuses_non_tensors(function: Callable[..., Tensor], x: object) -> None:
    message = f"x must be a torch.Tensor, got {type(x).__name__}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function(x)


@every_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_functional_refuses_integer_bool_and_complex_dtypes(
    function: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    message = f"x must be a floating-point tensor, got {dtype}; convert it: x.float()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function(torch.ones(1, 2, 3, 4, dtype=dtype))


@every_function
@pytest.mark.parametrize("shape", [(), (5,), (4, 5)], ids=str)
def test_functional_refuses_fewer_than_three_dimensions(
    function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    message = (
        f"x must have shape (N, C, *spatial), got {list(shape)}; "
        "add the missing dimensions, for example x.unsqueeze(0) for one sample"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(shape))


@every_function
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 0), (1, 2, 3, 0), (1, 2, 0, 3), (1, 2, 3, 0, 4), (0, 0, 0)],
    ids=str,
)
def test_functional_refuses_a_spatial_size_of_zero(
    function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    message = (
        f"x must have at least one position in each spatial dimension, got shape {list(shape)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(shape))


@every_function
@pytest.mark.parametrize("e_lambda", [0, 0.0, -1e-4, math.nan, math.inf, -math.inf])
def test_functional_refuses_invalid_lambda(
    function: Callable[..., Tensor], e_lambda: float
) -> None:
    message = (
        f"e_lambda must be a positive, finite number, got {e_lambda}; "
        "the authors use 1e-4 (CIFAR) and 0.1 (ImageNet)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(1, 2, 3, 4), e_lambda)


@every_function
@pytest.mark.parametrize("e_lambda", ["0.1", None, True, [0.1], 1j])
def test_functional_refuses_lambda_that_is_not_a_number(
    function: Callable[..., Tensor], e_lambda: object
) -> None:
    message = f"e_lambda must be a number, got {e_lambda!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function(torch.ones(1, 2, 3, 4), e_lambda)


@every_function
@pytest.mark.parametrize("statistics", ["", "Shared", "leave-one-out"])
def test_functional_refuses_unknown_statistics(
    function: Callable[..., Tensor], statistics: str
) -> None:
    message = f"statistics must be 'shared' or 'leave_one_out', got '{statistics}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(1, 2, 3, 4), statistics=statistics)


@every_function
def test_functional_takes_statistics_by_keyword_only(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match="positional arguments but 3 were given"):
        function(torch.ones(1, 2, 3, 4), 1e-4, "shared")
