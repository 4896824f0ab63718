"""The operators simam::forward and simam::backward, and when they run.

They are opaque to torch: it sees neither what they compute nor a derivative of it. So the
derivative stands outside, in an autograd function that saves the input alone, and whatever looks
into operations is given those of `reference` instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import kernels, reference

_library = torch.library.Library("simam", "DEF")
_library.define("forward(Tensor x, float e_lambda, str statistics) -> Tensor")
_library.define("backward(Tensor grad, Tensor x, float e_lambda, str statistics) -> Tensor")


def _forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    if kernels.serve(x):
        return kernels.run(x, None, e_lambda, statistics)
    return torch.empty_like(x).copy_(reference.forward(x, e_lambda, statistics))


def _backward(grad: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    if kernels.serve(x):
        return kernels.run(x, grad, e_lambda, statistics)
    return torch.empty_like(x).copy_(reference.backward(grad, x, e_lambda, statistics))


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


@torch.library.register_fake("simam::forward", lib=_library)
def _fake_forward(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("simam::backward", lib=_library)
def _fake_backward(grad: Tensor, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    return torch.empty_like(x)


_forward_op = torch.ops.simam.forward.default
_backward_op = torch.ops.simam.backward.default

# New in torch 2.7, and until 2.12 true under plain torch.compile too. Where it does not tell, what
# is compiled runs the reference, as what is exported must.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class _Scale(torch.autograd.Function):
    """Saves x alone: to find its moments again costs less than to keep them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e_lambda: float, statistics: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.e_lambda, ctx.statistics = e_lambda, statistics
        return _forward_op(x, e_lambda, statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # With grad mode on, the gradient is to be differentiated in its turn.
        opaque = not (torch.is_grad_enabled() or _is_transforming())
        backward = _backward_op if opaque else reference.backward
        return backward(grad, x, ctx.e_lambda, ctx.statistics), None, None


def scale(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """`simam` of an x that is checked, by the fastest way that gives the right answer here."""
    if not _takes_operator(x):
        return reference.forward(x, e_lambda, statistics)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Scale.apply(x, e_lambda, statistics)
    return _forward_op(x, e_lambda, statistics)


def _takes_operator(x: Tensor) -> bool:
    """Whether the operator may stand for the computation. The order of the questions matters."""
    # A transform may be what is being compiled: asked second, compile(jvp(f)) would be wrong.
    if torch._C._are_functorch_transforms_active():
        return False
    # A graph that leaves the process must run without this library. While compiling, the rest
    # need not be asked: the compiler takes subclasses apart and refuses dual numbers by itself.
    if torch.compiler.is_compiling():
        return not _is_exporting() and kernels.serve(x)
    # Forward mode drops the tangents of an operator that it knows nothing of, silently.
    if forward_ad._current_level >= 0:
        return False
    # A subclass gives operations a meaning of its own, and other layouts have no such memory.
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return False
    kernels.tell_missing(x)
    return kernels.serve(x)


def _is_transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
