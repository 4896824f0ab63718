"""SimAM as a layer."""

from numbers import Integral
from typing import Any

from torch import Tensor, nn

from . import functional as F


class SimAM(nn.Module):
    """Parameter-free attention as a layer. See `simam.functional.simam`.

    A drop-in for the authors' module and for timm's `attn_layer=`. The layer has no parameters
    and no buffers, so a network with SimAM loads the weights of the same network without SimAM.

    Args:
        channels (int, optional): ignored, because channels are independent; accepted because
            the authors' module and timm pass it first.
        e_lambda (float): the regulariser lambda, in the squared units of the input.
        statistics (str): "shared" (the authors') or "leave_one_out" (the exact minimum).
        device (any): ignored, because there are no parameters; timm passes it.
        dtype (any): ignored, like device.

    Raises:
        TypeError: channels is not an integer, or e_lambda is not a number.
        ValueError: channels is negative, e_lambda is not positive and finite, or statistics is
            unknown.

    Source:
        Yang et al., ICML 2021; see `simam.functional.simam` for the differences.

    Examples:
        >>> import torch
        >>> layer = SimAM(64, e_lambda=0.1)
        >>> layer
        SimAM(e_lambda=0.1, statistics='shared')
        >>> layer(torch.ones(1, 64, 1, 1)).mean()
        tensor(0.6225)
    """

    e_lambda: float
    statistics: str

    def __init__(
        self,
        channels: int | None = None,
        e_lambda: float = 1e-4,
        *,
        statistics: str = "shared",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            if isinstance(channels, bool) or not isinstance(channels, Integral):
                hint = f"; for the regulariser write SimAM(e_lambda={channels!r})"
                is_float = isinstance(channels, float)
                raise TypeError(
                    f"channels must be an integer or None, got {channels!r}{hint * is_float}"
                )
            if channels < 0:
                raise ValueError(f"channels must not be negative, got {channels}")
        F.check_number(e_lambda)
        F.check_options(float(e_lambda), statistics)
        self.e_lambda = float(e_lambda)
        self.statistics = statistics

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.simam_forward(x, self.e_lambda, self.statistics, mask)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda:g}, statistics={self.statistics!r}"
