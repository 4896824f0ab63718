"""Derivatives of every order, torch.func, autocast, and tensors without values."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from simam import functional as F

FUNCTIONS = (F.simam, F.attention, F.energy)
STATISTICS = ("shared", "leave_one_out")
SHAPES = (
    (2, 2, 5),  # the least rank
    (2, 2, 3, 2),
    (1, 2, 2, 1, 2, 2),  # one rank more than a video
    (1, 2, 2),  # M = 2, so that the others are one neuron, without variance
    (2, 2, 1, 1),  # M = 1, without any variance
)

# The first forward-mode derivative scripts the formulas that torch keeps for it.
pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.filterwarnings(
        r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning",
        r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
    ),
]

every_function = pytest.mark.parametrize("function", FUNCTIONS)
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)


@every_function
@both_statistics
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(
    function: Callable[..., Tensor], statistics: str, shape: tuple[int, ...], device: torch.device
) -> None:
    def of(x: Tensor) -> Tensor:
        return function(x, 0.1, statistics=statistics)

    x = normal(shape).to(device).requires_grad_()
    assert gradcheck(of, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(of, x, check_fwd_over_rev=True)


@both_statistics
def test_second_derivative_where_the_others_are_equal(statistics: str) -> None:
    # Leave-one-out finds that they have no variance, by cancellation, so to either side of 0.
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        output = F.simam(x, 1.0, statistics=statistics)
        return torch.autograd.grad(output, x, cotangent, create_graph=True)[0]

    def hessian(x: Tensor) -> Tensor:
        return torch.func.hessian(
            lambda x: (cotangent * F.simam(x, 1.0, statistics=statistics)).sum()
        )(x).reshape(5, 5)

    cotangent = normal((1, 1, 5), seed=1)
    step = 1e-5 * torch.eye(5, dtype=torch.float64).reshape(5, 1, 1, 5)
    for seed in range(10):
        base, peak = normal((2,), seed).tolist()
        x = torch.tensor([[[base, base, peak, base, base]]], dtype=torch.float64)
        rows = [(gradient(x + row) - gradient(x - row)) / 2e-5 for row in step]
        expected = torch.stack(rows).reshape(5, 5)
        torch.testing.assert_close(hessian(x), expected, rtol=1e-7, atol=1e-8)


@both_statistics
@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_vmap(statistics: str, in_dim: int, device: torch.device) -> None:
    def layer(x: Tensor) -> Tensor:
        return F.simam(x, 0.1, statistics=statistics)

    x = normal((3, 2, 4, 5, 6)).to(device)
    expected = torch.stack([layer(part) for part in x.unbind(in_dim)], in_dim)
    actual = torch.func.vmap(layer, in_dims=in_dim, out_dims=in_dim)(x)
    torch.testing.assert_close(actual, expected)


@both_statistics
def test_func_agrees_with_autograd(statistics: str, device: torch.device) -> None:
    def layer(x: Tensor) -> Tensor:
        return F.simam(x, 0.1, statistics=statistics)

    def loss(x: Tensor) -> Tensor:
        return (cotangent * layer(x)).sum()

    x = normal((2, 2, 3, 2)).to(device)
    cotangent = normal(x.shape, seed=1).to(device)
    direction = normal(x.shape, seed=2).to(device)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf), leaf, cotangent)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    close = torch.testing.assert_close

    close(torch.func.grad(loss)(x), gradient)
    output, tangent = torch.func.jvp(layer, (x,), (direction,))
    close(output, layer(x))
    close(tangent, torch.tensordot(jacobian, direction, x.dim()))
    output, pull = torch.func.vjp(layer, x)
    close(output, layer(x))
    close(pull(cotangent)[0], gradient)
    close(torch.func.jacrev(layer)(x), jacobian)
    close(torch.func.jacfwd(layer)(x), jacobian)
    close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


@both_statistics
def test_gradients_per_sample(statistics: str, device: torch.device) -> None:
    def loss(x: Tensor, cotangent: Tensor) -> Tensor:
        return (cotangent * F.simam(x[None], 0.1, statistics=statistics)[0]).sum()

    x = normal((3, 2, 4, 5)).to(device).requires_grad_()
    cotangent = normal(x.shape, seed=1).to(device)
    (expected,) = torch.autograd.grad(F.simam(x, 0.1, statistics=statistics), x, cotangent)
    actual = torch.func.vmap(torch.func.grad(loss))(x.detach(), cotangent)
    torch.testing.assert_close(actual, expected)


@every_function
@both_statistics
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_autocast_changes_nothing(
    function: Callable[..., Tensor],
    statistics: str,
    cast: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x = normal((2, 3, 4, 5)).to(device, dtype).requires_grad_()
    cotangent = normal(x.shape, seed=1).to(device, dtype)
    expected = function(x, 0.1, statistics=statistics)
    (expected_gradient,) = torch.autograd.grad(expected, x, cotangent)
    with torch.autocast(device.type, dtype=cast):
        actual = function(x, 0.1, statistics=statistics)
    (gradient,) = torch.autograd.grad(actual, x, cotangent)
    assert actual.dtype == gradient.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(("place", "mode"), [("meta", nullcontext), ("cpu", FakeTensorMode)])
@every_function
@both_statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 4),
        (2, 3, 4, 5),
        (2, 3, 1, 1),
        (0, 3, 4, 5),  # the batch may be empty
        (2, 3, 4, 5, 6),
    ],
)
def test_tensors_without_values(
    function: Callable[..., Tensor],
    statistics: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    place: str,
    mode: type[AbstractContextManager],
) -> None:
    real = function(torch.ones(shape, dtype=dtype).mT, statistics=statistics)
    with mode():
        x = torch.empty(shape, dtype=dtype, device=place).mT.requires_grad_()
        output = function(x, statistics=statistics)
        (gradient,) = torch.autograd.grad(output, x, torch.empty_like(output))
    assert output.device == gradient.device == x.device
    assert output.dtype == gradient.dtype == dtype
    assert output.shape == gradient.shape == real.shape
    # Where nothing lies, strides mean nothing.
    assert output.stride() == real.stride() or not real.numel()


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
