"""The operators simam::forward and simam::backward, autograd around them, and when they run.

The operators are opaque to torch, which sees neither their arithmetic nor a derivative. So an
autograd function around them provides the gradient, and whatever has to see the arithmetic, such
as torch.func or export, runs `reference` instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import kernels, reference

_library = torch.library.Library("simam", "DEF")
_library.define("forward(Tensor x, float e_lambda, str statistics) -> Tensor")
_library.define("backward(Tensor grad_output, Tensor x, float e_lambda, str statistics) -> Tensor")


def _forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    if kernels.is_supported(x):
        return kernels.forward(x, e_lambda, statistics)
    return torch.empty_like(x).copy_(reference.forward(x, e_lambda, statistics))


def _backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    if kernels.is_supported(x):
        return kernels.backward(grad_output, x, e_lambda, statistics)
    return torch.empty_like(x).copy_(reference.backward(grad_output, x, e_lambda, statistics))


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


@torch.library.register_fake("simam::forward", lib=_library)
def _fake_forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("simam::backward", lib=_library)
def _fake_backward(grad_output: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    return torch.empty_like(x)


_forward_op = torch.ops.simam.forward.default
_backward_op = torch.ops.simam.backward.default

# is_exporting came with torch 2.7. Before 2.12 it is true under plain torch.compile too. Where it
# cannot separate the two, compiled graphs run the reference, as exported graphs must.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class _SimAMFunction(torch.autograd.Function):
    """Saves only x: recomputing the moments is cheaper than storing them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.e_lambda, ctx.statistics = e_lambda, statistics
        return _forward_op(x, e_lambda, statistics)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # Grad mode is on in backward if the gradient will itself be differentiated.
        opaque = not (torch.is_grad_enabled() or _is_transforming())
        backward = _backward_op if opaque else reference.backward
        return backward(grad_output, x, ctx.e_lambda, ctx.statistics), None, None


def simam_forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """Apply SimAM to a validated x, with the fused operator where that is safe."""
    if not _is_operator_safe(x):
        return reference.forward(x, e_lambda, statistics)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SimAMFunction.apply(x, e_lambda, statistics)
    return _forward_op(x, e_lambda, statistics)


def _is_operator_safe(x: Tensor) -> bool:
    """Return whether the operator gives the right answer here. The order of the checks matters."""
    # First, because compile(jvp(f)) would be wrong if compiling were checked before transforms.
    if torch._C._are_functorch_transforms_active():
        return False
    # An exported graph must run without this library. While compiling, the checks below are not
    # needed: the compiler unwraps subclasses and refuses dual numbers.
    if torch.compiler.is_compiling():
        return not _is_exporting() and kernels.is_supported(x)
    # Forward-mode AD silently drops the tangents of an operator that it does not know.
    if forward_ad._current_level >= 0:
        return False
    # A subclass may redefine operations, and other layouts have no strided memory.
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return False
    kernels.warn_if_unavailable(x)
    return kernels.is_supported(x)


def _is_transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
