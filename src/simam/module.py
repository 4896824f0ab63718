"""SimAM as a layer."""

import math
import warnings
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

from . import functional as F
from .state_dict import OPTIONS, format_options


class SimAM(nn.Module):
    """Parameter-free attention as a layer. See `simam.functional.simam`.

    A drop-in for the authors' module and for timm's `attn_layer=`. The layer has no parameters
    and no buffers, so a network with SimAM loads the weights of the same network without SimAM.
    Calling the layer takes x and, for padded batches, a mask.

    Args:
        channels (int, optional): ignored, because channels are independent; accepted because
            the authors' module and timm pass it first.
        e_lambda (float): the regulariser lambda, in the squared units of the input. An integer is
            refused: frameworks that pass the input and output channels would set lambda to 128.
        statistics (str): "shared" (the authors') or "leave_one_out" (the exact minimum).
        device (any): ignored, because there are no parameters; timm passes it.
        dtype (any): ignored, like device.

    Raises:
        TypeError: channels is not an integer, e_lambda is an integer or not a number, or there are
            more arguments without a name.
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

    # Defaults for a pickle of a class by another author that is now an alias of this one.
    e_lambda: float = 1e-4
    statistics: str = "shared"

    _last_warned_load: ClassVar[list[str] | None] = None

    def __init__(
        self,
        channels: int | None = None,
        e_lambda: float = 1e-4,
        *others: Any,
        statistics: str = "shared",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            if isinstance(channels, bool) or not isinstance(channels, Integral):
                number = _number(channels)
                hint = f"; for the regulariser write SimAM(e_lambda={number}), in a row of YAML "
                raise TypeError(
                    f"channels must be an integer or None, got {channels!r}"
                    + (f"{hint}[null, {number}]" if number else "")
                )
            if channels < 0:
                raise ValueError(f"channels must not be negative, got {channels}")
        if isinstance(e_lambda, Integral) and not isinstance(e_lambda, bool):
            raise TypeError(
                f"e_lambda must be a float, got the integer {e_lambda}, which looks like a number "
                "of output channels; SimAM keeps the number of channels and takes only one. If "
                f"lambda is meant, write e_lambda={float(e_lambda)}"
            )
        if others:
            raise TypeError(
                "expected at most channels and e_lambda without a name, got also "
                f"{', '.join(map(repr, others))}; write statistics=, device= or dtype="
            )
        if isinstance(e_lambda, str) and _number(e_lambda):
            raise TypeError(
                f"e_lambda must be a number, got {e_lambda!r}; write the number "
                f"{_number(e_lambda)}. YAML reads 1e-4 as text"
            )
        F.check_number(e_lambda)
        F.check_options(float(e_lambda), statistics)
        self.e_lambda = float(e_lambda)
        self.statistics = statistics

    @staticmethod
    def get_module_name() -> str:
        """Return "simam", which the blocks of the authors' networks ask for."""
        return "simam"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.simam_forward(x, self.e_lambda, self.statistics, mask)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda:g}, statistics={self.statistics!r}"

    def _options(self) -> dict[str, Any]:
        return {"e_lambda": float(self.e_lambda), "statistics": self.statistics}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Into the version metadata of torch, which has an entry for every module: a key among the
        # tensors would not fit the same network without SimAM.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {}).update(self._options())

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        own = self._options()
        saved = {option: local_metadata[option] for option in OPTIONS if option in local_metadata}
        differs = any(own[option] != value for option, value in saved.items())
        # In one load, all layers get the same list. One warning is enough.
        if differs and SimAM._last_warned_load is not missing_keys:
            SimAM._last_warned_load = missing_keys
            warnings.warn(
                f"{prefix[:-1] or 'SimAM'}: these weights were saved with "
                f"{format_options(saved)}, but this layer has {format_options(own)}, so outputs "
                "may differ from those in training; the same may hold for other layers",
                stacklevel=2,
            )


def _number(value: Any) -> str:
    """Write a float, or the float in a text, such that YAML reads a number: 1.0e-05, not 1e-05.

    Empty for any other value.
    """
    is_text = isinstance(value, str) and not value.isdecimal()  # "64" is no lambda
    try:
        number = float(value) if isinstance(value, float) or is_text else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    digits, e, exponent = repr(number).partition("e")
    return f"{digits if '.' in digits else digits + '.0'}{e}{exponent}"
