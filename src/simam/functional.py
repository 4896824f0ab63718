"""SimAM as functions: what is computed, and which inputs are refused."""

import math
from numbers import Real

import torch
from torch import Tensor, fx

from . import masked, ops, reference

__all__ = ["attention", "energy", "simam"]


def simam(
    x: Tensor,
    e_lambda: float = 1e-4,
    *,
    statistics: str = "shared",
    mask: Tensor | None = None,
) -> Tensor:
    """Scale every neuron by how much it stands out from the rest of its channel.

    For every neuron t, SimAM asks how well a linear function w x + b separates t, labelled +1,
    from the other M - 1 neurons x_i of its channel, labelled -1. It minimises the energy

        e(w, b) = mean_i (-1 - (w x_i + b))^2 + (1 - (w t + b))^2 + lambda w^2

    in closed form and multiplies t by the gate `sigmoid(1 / e*)`, where `e*` is the minimum: the
    lower the energy, the more the neuron stands out. There are no parameters to learn. Channels
    and samples are independent of each other, and the gate lies between sigmoid(1/2) = 0.622
    and 1.

    Args:
        x (Tensor[N, C, *spatial]): feature maps with one or more spatial dimensions. Float16 and
            bfloat16 are computed in float32.
        e_lambda (float): the regulariser lambda, in the squared units of x. The authors use
            1e-4 on CIFAR and 0.1 on ImageNet and COCO.
        statistics (str): "shared", the authors' choice, uses one mean and one variance for the
            whole channel. "leave_one_out" uses the mean and variance of the other neurons, which
            gives the exact minimum. The gates differ visibly on small maps, by up to 0.029 at
            7x7.
        mask (Tensor, optional): bool, broadcastable to (N, 1, *spatial). Where it is True, the
            position counts for the statistics of its channel, as in a batch of padded sequences.
            The counted positions come out as without the others, which are scaled by the gate that
            the counted ones give them. A sample without counted positions gets the gate
            sigmoid(1/2). With a mask, plain torch operations run instead of the fused kernel.

    Returns:
        Tensor[N, C, *spatial]: same shape, dtype and, for a dense x, strides.

    Raises:
        TypeError: x is not a floating-point tensor, e_lambda is not a number, or mask is not a bool
            tensor.
        ValueError: x has fewer than three dimensions or a spatial size of 0, e_lambda is not
            positive and finite, statistics is unknown, or mask does not broadcast.

    Source:
        Yang et al., ICML 2021, equations 1 to 6. The paper divides the shared variance by M; the
        authors' networks, and this function, divide by M - 1. A channel of one neuron has
        variance 0, so its gate is sigmoid(1/2).

    Examples:
        >>> x = torch.tensor([[[0.0, 0.0, 0.0, 4.0]]])
        >>> simam(x)
        tensor([[[0.0000, 0.0000, 0.0000, 2.9727]]])
        >>> padded = torch.tensor([[[0.0, 0.0, 0.0, 4.0, 7.0]]])
        >>> simam(padded, mask=torch.tensor([True, True, True, True, False]))[..., :4]
        tensor([[[0.0000, 0.0000, 0.0000, 2.9727]]])
    """
    check_number(e_lambda)
    return simam_forward(x, e_lambda, statistics, mask)


def attention(
    x: Tensor,
    e_lambda: float = 1e-4,
    *,
    statistics: str = "shared",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the gate `sigmoid(1 / e*)`, by which `simam` multiplies each neuron.

    Args:
        x (Tensor[N, C, *spatial]): feature maps, as for `simam`.
        e_lambda (float): the regulariser lambda, in the squared units of x.
        statistics (str): "shared" or "leave_one_out".
        mask (Tensor, optional): which positions count, as for `simam`.

    Returns:
        Tensor[N, C, *spatial]: gates from sigmoid(1/2) = 0.622 to 1, dimensionless, in x's dtype.

    Raises:
        TypeError, ValueError: as for `simam`.

    Source:
        Yang et al., ICML 2021, the factor in equation 6.

    Examples:
        >>> attention(torch.tensor([[[0.0, 0.0, 0.0, 4.0]]]))
        tensor([[[0.6370, 0.6370, 0.6370, 0.7432]]])
    """
    check_number(e_lambda)
    _check(x, e_lambda, statistics)
    if mask is not None:
        _check_mask(x, mask)
        return masked.attention(x, mask, e_lambda, statistics)
    return reference.attention(x, e_lambda, statistics)


def energy(
    x: Tensor,
    e_lambda: float = 1e-4,
    *,
    statistics: str = "shared",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the minimal energy `e*`: how hard it is to separate each neuron from its channel.

    Args:
        x (Tensor[N, C, *spatial]): feature maps, as for `simam`.
        e_lambda (float): the regulariser lambda, in the squared units of x.
        statistics (str): "shared" or "leave_one_out".
        mask (Tensor, optional): which positions count, as for `simam`.

    Returns:
        Tensor[N, C, *spatial]: energies from 0, for a neuron that stands out, to 2, for a neuron
        equal to the mean of its channel; dimensionless, in x's dtype.

    Raises:
        TypeError, ValueError: as for `simam`.

    Source:
        Yang et al., ICML 2021, equation 5.

    Examples:
        >>> energy(torch.tensor([[[0.0, 0.0, 0.0, 4.0]]]), statistics="leave_one_out")
        tensor([[[1.6000e+00, 1.6000e+00, 1.6000e+00, 2.5000e-05]]])
    """
    check_number(e_lambda)
    _check(x, e_lambda, statistics)
    if mask is not None:
        _check_mask(x, mask)
        return masked.energy(x, mask, e_lambda, statistics)
    return reference.energy(x, e_lambda, statistics)


@fx.wrap  # one node in an fx graph, because the checks need a tensor
def simam_forward(
    x: Tensor, e_lambda: float, statistics: str, mask: Tensor | None = None
) -> Tensor:
    """Validate x and apply SimAM; positional, as TorchScript has no keyword-only arguments."""
    _check(x, e_lambda, statistics)
    if mask is not None:
        _check_mask(x, mask)
        return masked.forward(x, mask, e_lambda, statistics)
    # TorchScript compiles only this branch, and a traced graph must hold torch's operators alone.
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return reference.forward(x, e_lambda, statistics)
    else:  # noqa: RET505 - an explicit branch, which TorchScript skips
        return ops.simam_forward(x, e_lambda, statistics)


def check_number(e_lambda: object) -> None:
    """Refuse an e_lambda that is not a number. TorchScript checks the type itself."""
    # A tuple, because torch.compile in torch 2.6 does not support union types.
    if isinstance(e_lambda, bool) or not isinstance(e_lambda, (Real, torch.SymFloat)):
        raise TypeError(f"e_lambda must be a number, got {e_lambda!r}")


def check_options(e_lambda: float, statistics: str) -> None:
    """Refuse invalid values of e_lambda and statistics."""
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
    # While tracing, a size is a tensor, and testing it would fix the answer for every later size.
    if not torch.jit.is_tracing() and 0 in x.shape[2:]:
        raise ValueError(
            f"x must have at least one position in each spatial dimension, got shape "
            f"{list(x.shape)}"
        )


def _check_mask(x: Tensor, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}; convert it: mask.bool()")
    expected = [x.shape[0], 1] + list(x.shape[2:])  # noqa: RUF005 - TorchScript has no unpacking
    extra = len(expected) - mask.dim()
    fits = extra >= 0
    for i in range(mask.dim()):
        fits = fits and (mask.shape[i] == 1 or mask.shape[i] == expected[max(extra, 0) + i])
    if not fits:
        raise ValueError(
            f"mask must broadcast to (N, 1, *spatial), here {expected}, got {list(mask.shape)}; "
            "add the missing dimensions, for example mask[:, None]"
        )
