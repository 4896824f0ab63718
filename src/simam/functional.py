"""SimAM as functions: what is computed, and which input is refused."""

import math
from numbers import Real

import torch
from torch import Tensor, fx

from . import ops, reference


def simam(x: Tensor, e_lambda: float = 1e-4, *, statistics: str = "shared") -> Tensor:
    """Scale every neuron by how much it stands out from the rest of its channel.

    How well can a linear function w x + b tell a neuron t, labelled +1, from the other M - 1
    neurons x_i of its channel, labelled -1? SimAM asks it of every neuron: it minimises the
    energy

        e(w, b) = mean_i (-1 - (w x_i + b))^2 + (1 - (w t + b))^2 + lambda w^2

    in closed form, and multiplies the neuron by `sigmoid(1 / e*)` of the minimum `e*`: the lower
    the energy, the more distinct the neuron. There are no parameters to learn. Channels and
    samples do not see each other, and the gate lies between sigmoid(1/2) = 0.622 and 1.

    Args:
        x (Tensor[N, C, *spatial]): feature maps of one or more spatial dimensions; float16 and
            bfloat16 are computed in float32.
        e_lambda (float): the regulariser lambda, in the squared units of x. The authors use
            1e-4 on CIFAR and 0.1 on ImageNet and COCO.
        statistics (str): "shared", as the authors do, takes one mean and one variance for the
            whole channel; "leave_one_out" takes those of the other neurons, which gives the
            exact minimum. They differ visibly on small maps: by up to 0.029 in the gate at 7x7.

    Returns:
        Tensor[N, C, *spatial]: same shape, dtype and, for a dense x, strides.

    Raises:
        TypeError: x is not a floating-point tensor, or e_lambda is not a number.
        ValueError: x has fewer than three dimensions or a spatial size of 0, e_lambda is not
            positive and finite, or statistics is unknown.

    Source:
        Yang et al., ICML 2021, equations 1 to 6. There the shared variance divides by M; here,
        as in the published networks, by M - 1. A channel of one neuron has variance 0, so its
        gate is sigmoid(1/2).

    Examples:
        >>> x = torch.tensor([[[0.0, 0.0, 0.0, 4.0]]])
        >>> simam(x)
        tensor([[[0.0000, 0.0000, 0.0000, 2.9727]]])
    """
    check_number(e_lambda)
    return scale(x, e_lambda, statistics)


def attention(x: Tensor, e_lambda: float = 1e-4, *, statistics: str = "shared") -> Tensor:
    """Show how much weight each neuron gets: the gate `sigmoid(1 / e*)` of `simam`.

    Args:
        x (Tensor[N, C, *spatial]): see `simam`, as for the other arguments.
        e_lambda (float): the regulariser lambda, in the squared units of x.
        statistics (str): "shared" or "leave_one_out".

    Returns:
        Tensor[N, C, *spatial]: gates from sigmoid(1/2) = 0.622 to 1, without unit, in x's dtype.

    Raises:
        TypeError, ValueError: as `simam`.

    Source:
        Yang et al., ICML 2021, the factor in equation 6.

    Examples:
        >>> attention(torch.tensor([[[0.0, 0.0, 0.0, 4.0]]]))
        tensor([[[0.6370, 0.6370, 0.6370, 0.7432]]])
    """
    check_number(e_lambda)
    _check(x, e_lambda, statistics)
    return reference.attention(x, e_lambda, statistics)


def energy(x: Tensor, e_lambda: float = 1e-4, *, statistics: str = "shared") -> Tensor:
    """Measure how hard each neuron is to tell from its channel: the minimal energy `e*`.

    Args:
        x (Tensor[N, C, *spatial]): see `simam`, as for the other arguments.
        e_lambda (float): the regulariser lambda, in the squared units of x.
        statistics (str): "shared" or "leave_one_out".

    Returns:
        Tensor[N, C, *spatial]: energies from 0, distinct, to 2, no different from the rest;
        without unit, in x's dtype.

    Raises:
        TypeError, ValueError: as `simam`.

    Source:
        Yang et al., ICML 2021, equation 5.

    Examples:
        >>> energy(torch.tensor([[[0.0, 0.0, 0.0, 4.0]]]), statistics="leave_one_out")
        tensor([[[1.6000e+00, 1.6000e+00, 1.6000e+00, 2.5000e-05]]])
    """
    check_number(e_lambda)
    _check(x, e_lambda, statistics)
    return reference.energy(x, e_lambda, statistics)


@fx.wrap  # one node in a traced graph: the checks need a tensor
def scale(x: Tensor, e_lambda: float, statistics: str) -> Tensor:
    """`simam` for TorchScript, which knows no keyword-only arguments."""
    _check(x, e_lambda, statistics)
    # TorchScript does not read beyond its own branch, and a trace must hold torch's operators.
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return reference.forward(x, e_lambda, statistics)
    else:  # noqa: RET505 - as TorchScript wants it
        return ops.scale(x, e_lambda, statistics)


def check_number(e_lambda: object) -> None:
    """Refuse a lambda of another type, which TorchScript does by itself."""
    # A tuple, since the compiler of torch 2.6 knows no union types.
    if isinstance(e_lambda, bool) or not isinstance(e_lambda, (Real, torch.SymFloat)):
        raise TypeError(f"e_lambda must be a number, got {e_lambda!r}")


def check_options(e_lambda: float, statistics: str) -> None:
    """Refuse options that `simam` could not compute with."""
    if not (e_lambda > 0.0 and e_lambda < math.inf):
        raise ValueError(
            f"e_lambda must be a positive, finite number, got {e_lambda}; "
            "the authors use 1e-4 (CIFAR) and 0.1 (ImageNet)"
        )
    if statistics != "shared" and statistics != "leave_one_out":
        raise ValueError(f"statistics must be 'shared' or 'leave_one_out', got '{statistics}'")


def _check(x: Tensor, e_lambda: float, statistics: str) -> None:
    check_options(e_lambda, statistics)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert it: x.float()")
    if x.dim() < 3:
        raise ValueError(
            f"x must have shape (N, C, *spatial), got {list(x.shape)}; "
            "add the missing dimensions, for example x.unsqueeze(0) for one sample"
        )
    # A traced size is a tensor, and asking it for a truth value would freeze the answer.
    if not torch.jit.is_tracing() and 0 in x.shape[2:]:
        raise ValueError(
            f"x must have at least one position in each spatial dimension, got shape "
            f"{list(x.shape)}"
        )
