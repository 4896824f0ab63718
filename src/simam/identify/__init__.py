"""Which formula somebody's SimAM module computes."""

from dataclasses import dataclass

from torch import nn

from ..messages import table
from .examination import examine
from .subject import quietly

__all__ = ["Identification", "identify"]


@dataclass(frozen=True)
class Identification:
    """What a module computes; `print` shows it as a table.

    Attributes:
        formula (str): "shared" or "leave_one_out", if the module equals this form within rounding
            on all probes; "other" if it does not.
        e_lambda (float or None): lambda, fitted; None if there is none.
        max_error (float): the largest difference of the output from the form, or with "other" from
            the nearer of both; relative to the largest value of a channel.
        difference (str): what differs from the paper's, in words; "" if nothing does.
    """

    formula: str
    e_lambda: float | None
    max_error: float
    difference: str

    def __str__(self) -> str:
        rows = [
            ("formula", self.formula),
            ("e_lambda", "none" if self.e_lambda is None else f"{self.e_lambda:.6g}"),
            ("max error", f"{self.max_error:.2g}"),
            ("difference", self.difference or "none"),
        ]
        return table(rows)


def identify(module: nn.Module) -> Identification:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}")
    with quietly():
        verdict = examine(module)
    return Identification(
        verdict.formula, verdict.e_lambda, verdict.max_error, verdict.difference
    )
