"""What a convolution with a forward of its own does behind the convolution.

Some libraries write a convolution, its norm and its activation as one module. SimAM behind such a
module is not before the norm.
"""

import inspect
import operator
from itertools import chain
from typing import NamedTuple

import torch
from torch import fx, nn

from ..messages import one_line
from .convolutions import (
    holds_spatial_convolution,
    is_convolution,
    plain_class,
    within_adapters,
)
from .graph import NONLINEAR, Graph, operation
from .tracing import traces

_PLAIN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d,
        nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    )
}  # fmt: skip
_DIVIDE = {operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide"}


class Behind(NamedTuple):
    """What follows the convolution in the forward of a convolution class.

    Attributes:
        names (list[str]): norms and non-linearities, by their classes and functions, in order.
        error (str): what stopped the trace of the forward, so that nothing is known.
    """

    names: list[str]
    error: str = ""

    def __str__(self) -> str:
        """Complete the sentence "the forward of this convolution ..."; empty if nothing follows."""
        if self.error:
            return f"cannot be traced ({self.error})"
        return f"goes on to {', '.join(self.names)}" if self.names else ""


def behind_convolution(convolution: nn.Module) -> Behind:
    """Find the norms and the non-linearities behind the convolution in its own forward.

    What comes before it (padding, standardised weights, kernels chosen by the input) does not
    count, nor do linear operations behind it (a bias, a new shape).
    """
    convolution = within_adapters(convolution)
    # Statically, since the class of a scripted module raises.
    if inspect.getattr_static(plain_class(convolution), "forward") in _PLAIN_FORWARDS:
        return Behind([])
    found = traces(convolution, is_convolution, lambda part: not holds_spatial_convolution(part))
    try:
        names = chain(*(_names_behind(Graph(convolution, trace)) for trace in found))
        return Behind(list(dict.fromkeys(names)))
    except Exception as error:  # the code of the convolution, run on symbols, may raise anything
        return Behind([], one_line(error, 100))


def _names_behind(graph: Graph) -> list[str]:
    """The norms and non-linearities on the way from the last convolutions to the output."""
    names: list[str] = []
    ahead = [graph.output]
    for node in ahead:
        module = graph.called(node)
        if module is not None and is_convolution(module):
            inside = behind_convolution(module)
            if inside.error:
                raise RuntimeError(inside.error)
            names += reversed(inside.names)
        elif "conv" not in graph.name(node):
            names += filter(None, [_norm_or_nonlinearity(graph, node)])
            ahead += [operand for operand in graph.operands(node) if operand not in ahead]
    return names[::-1]


def _norm_or_nonlinearity(graph: Graph, node: fx.Node) -> str:
    """The name of the module or function if it is a norm or not linear, else an empty string."""
    for path in reversed(graph.trace.callers[node]):
        name: str = plain_class(graph.modules[path]).__name__
        if any(part in name.lower() for part in ("norm", *NONLINEAR)):
            return name
    name = graph.name(node)
    is_quotient = operation(node) in _DIVIDE and len(graph.operands(node)) > 1
    return name if is_quotient or "norm" in name or graph.is_nonlinear(node) else ""
