"""Derivatives of every order, torch.func, autocast, and meta and fake tensors."""

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
    (2, 2, 5),  # the smallest rank
    (2, 2, 3, 2),
    (1, 2, 2, 1, 2, 2),  # one rank more than a video
    (1, 2, 2),  # M = 2: there is one other neuron, without variance
    (2, 2, 1, 1),  # M = 1: there is no variance at all
)

# The first forward-mode derivative makes torch script its own formulas.
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
def test_functional_passes_gradcheck(
    function: Callable[..., Tensor], statistics: str, shape: tuple[int, ...], device: torch.device
) -> None:
    def layer(x: Tensor) -> Tensor:
        return function(x, 0.1, statistics=statistics)

    x = normal(shape).to(device).requires_grad_()
    assert gradcheck(layer, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, x, check_fwd_over_rev=True)


@both_statistics
def test_simam_hessian_where_the_other_neurons_are_equal(statistics: str) -> None:
    # Leave-one-out computes their variance, which is 0, by cancellation, so it may be negative.
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        output = F.simam(x, 1.0, statistics=statistics)
        return torch.autograd.grad(output, x, grad_output, create_graph=True)[0]

    def hessian(x: Tensor) -> Tensor:
        return torch.func.hessian(
            lambda x: (grad_output * F.simam(x, 1.0, statistics=statistics)).sum()
        )(x).reshape(5, 5)

    grad_output = normal((1, 1, 5), seed=1)
    step = 1e-5 * torch.eye(5, dtype=torch.float64).reshape(5, 1, 1, 5)
    for seed in range(10):
        base, peak = normal((2,), seed).tolist()
        x = torch.tensor([[[base, base, peak, base, base]]], dtype=torch.float64)
        rows = [(gradient(x + row) - gradient(x - row)) / 2e-5 for row in step]
        expected = torch.stack(rows).reshape(5, 5)
        torch.testing.assert_close(hessian(x), expected, rtol=1e-7, atol=1e-8)


@both_statistics
@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_simam_vmap(statistics: str, in_dim: int, device: torch.device) -> None:
    def layer(x: Tensor) -> Tensor:
        return F.simam(x, 0.1, statistics=statistics)

    x = normal((3, 2, 4, 5, 6)).to(device)
    expected = torch.stack([layer(part) for part in x.unbind(in_dim)], in_dim)
    actual = torch.func.vmap(layer, in_dims=in_dim, out_dims=in_dim)(x)
    torch.testing.assert_close(actual, expected)


@both_statistics
def test_simam_func_transforms_match_autograd(statistics: str, device: torch.device) -> None:
    def layer(x: Tensor) -> Tensor:
        return F.simam(x, 0.1, statistics=statistics)

    def loss(x: Tensor) -> Tensor:
        return (grad_output * layer(x)).sum()

    x = normal((2, 2, 3, 2)).to(device)
    grad_output = normal(x.shape, seed=1).to(device)
    direction = normal(x.shape, seed=2).to(device)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf), leaf, grad_output)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    close = torch.testing.assert_close

    close(torch.func.grad(loss)(x), gradient)
    output, tangent = torch.func.jvp(layer, (x,), (direction,))
    close(output, layer(x))
    close(tangent, torch.tensordot(jacobian, direction, x.dim()))
    output, vjp = torch.func.vjp(layer, x)
    close(output, layer(x))
    close(vjp(grad_output)[0], gradient)
    close(torch.func.jacrev(layer)(x), jacobian)
    close(torch.func.jacfwd(layer)(x), jacobian)
    close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


@both_statistics
def test_simam_per_sample_gradients(statistics: str, device: torch.device) -> None:
    def loss(x: Tensor, grad_output: Tensor) -> Tensor:
        return (grad_output * F.simam(x[None], 0.1, statistics=statistics)[0]).sum()

    x = normal((3, 2, 4, 5)).to(device).requires_grad_()
    grad_output = normal(x.shape, seed=1).to(device)
    (expected,) = torch.autograd.grad(F.simam(x, 0.1, statistics=statistics), x, grad_output)
    actual = torch.func.vmap(torch.func.grad(loss))(x.detach(), grad_output)
    torch.testing.assert_close(actual, expected)


@every_function
@both_statistics
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_functional_ignores_autocast(
    function: Callable[..., Tensor],
    statistics: str,
    cast: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x = normal((2, 3, 4, 5)).to(device, dtype).requires_grad_()
    grad_output = normal(x.shape, seed=1).to(device, dtype)
    expected = function(x, 0.1, statistics=statistics)
    (expected_gradient,) = torch.autograd.grad(expected, x, grad_output)
    with torch.autocast(device.type, dtype=cast):
        actual = function(x, 0.1, statistics=statistics)
    (gradient,) = torch.autograd.grad(actual, x, grad_output)
    assert actual.dtype == gradient.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(("device_type", "mode"), [("meta", nullcontext), ("cpu", FakeTensorMode)])
@every_function
@both_statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 4),
        (2, 3, 4, 5),
        (2, 3, 1, 1),
        (0, 3, 4, 5),  # an empty batch
        (2, 3, 4, 5, 6),
    ],
)
def test_functional_on_meta_and_fake_tensors(
    function: Callable[..., Tensor],
    statistics: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device_type: str,
    mode: type[AbstractContextManager],
) -> None:
    real = function(torch.ones(shape, dtype=dtype).mT, statistics=statistics)
    with mode():
        x = torch.empty(shape, dtype=dtype, device=device_type).mT.requires_grad_()
        output = function(x, statistics=statistics)
        (gradient,) = torch.autograd.grad(output, x, torch.empty_like(output))
    assert output.device == gradient.device == x.device
    assert output.dtype == gradient.dtype == dtype
    assert output.shape == gradient.shape == real.shape
    # The strides of an empty tensor do not matter.
    assert output.stride() == real.stride() or not real.numel()


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
