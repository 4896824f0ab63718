"""Which formula somebody's SimAM module computes."""

import textwrap
from dataclasses import dataclass

from torch import nn

from ..messages import table

__all__ = ["Identification", "identify"]


@dataclass(frozen=True)
class Identification:
    """What a module computes; `print` shows it as a table.

    Attributes:
        formula (str): "shared" or "leave_one_out" if the module computes x times the gate of this
            form, within rounding, on every input that was tried; otherwise "other".
        e_lambda (float or None): the lambda that the module computes with, fitted to its outputs;
            None if it has none, or if none could be found.
        max_error (float): the largest difference of an output from the form, or with "other" from
            the nearer of both forms, relative to the largest value of its channel in input and
            output.
        difference (str): what differs from the paper, in words; "" if nothing does.
    """

    formula: str
    e_lambda: float | None
    max_error: float
    difference: str

    def __str__(self) -> str:
        texts = textwrap.wrap(self.difference, width=80) or ["none"]
        rows = [
            ("formula", self.formula),
            ("e_lambda", "none" if self.e_lambda is None else f"{self.e_lambda:.6g}"),
            ("max error", f"{self.max_error:.2g}"),
            *zip(["difference", *[""] * (len(texts) - 1)], texts, strict=True),
        ]
        return table(rows)


def identify(module: nn.Module) -> Identification:
    """Find out which formula somebody's SimAM module computes, and with which lambda.

    Many copies of SimAM compute something else than the paper. `identify` runs a copy of the module
    on inputs of its own: maps of several sizes, scales, offsets and kinds, in float64 where the
    module takes it. It names every difference that it finds. The module itself is never run: its
    state, mode, hooks and the random generators stay as they are. What the module prints is not
    shown. The copy runs on the CPU, in evaluation mode.

    "shared" and "leave_one_out" are equality within rounding: in float64 2e-12 of the largest value
    of a channel, or 1e-5 if the module computes in float32, times the square of
    1 + |mean| / sqrt(variance + lambda), since a large mean costs digits. The gradient agrees, too.
    Such a module may still differ where the paper's formula is undefined or fails: NaN on a map of
    one element, an overflow in float16.

    Args:
        module (nn.Module): a layer that takes one tensor and returns one, such as a SimAM.

    Returns:
        Identification: formula, e_lambda, max_error and difference.

    Raises:
        TypeError: module is not a module.
        ValueError: the module cannot be copied, or fails on every input that was tried.

    Examples:
        >>> class Gate(nn.Module):
        ...     def forward(self, x):
        ...         d = x - x.mean((2, 3), keepdim=True)
        ...         v = x.var((2, 3), keepdim=True)
        ...         return (d**2 / (4 * (v + 0.1)) + 0.5).sigmoid()
        >>> found = identify(Gate())
        >>> found.formula, found.e_lambda
        ('other', 0.1)
        >>> found.difference[:40]
        'returns the gate instead of x * gate, gi'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}")
    from .examination import examine  # late, because few programs that import simam need it

    verdict = examine(module)
    return Identification(verdict.formula, verdict.e_lambda, verdict.max_error, verdict.difference)
