"""The values that a module computes, from its trace: their operations and operands."""

import operator
from typing import Any

import torch
from torch import fx, nn

from .convolutions import plain_class
from .tracing import Trace

_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
# Operations whose result depends on the shape of a tensor, but not on its values.
_SIZES = {"size", "dim", "numel", "shape", "ndim", "dtype", "device"}
_NEW_TENSORS = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
# Operations that take only a shape, a dtype or a device from the tensors behind the first.
_AS_ANOTHER = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
# Operations that may lie between the sigmoid of a gate and the product. Each takes the tensor
# first.
_RESHAPE = {
    "contiguous", "expand", "expand_as", "getitem", "interpolate", "permute", "reshape", "to",
    "transpose", "type_as", "unsqueeze", "view", "view_as",
}  # fmt: skip
_SUBTRACT = {"rsub", "sub"}
# Substrings of the names of functions and modules, in lower case.
_GATES = ("sigmoid", "softmax")
NONLINEAR = (
    *_GATES, "clamp", "elu", "glu", "mish", "shrink", "silu", "simam", "softplus", "softsign",
    "swish", "tanh", "threshold",
)  # fmt: skip


class Graph:
    """The values of a module that depend on its input, along one path through its control flow."""

    def __init__(self, module: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.modules = dict(module.named_modules())
        # Only nodes that depend on the values of the input: no parameters, no sizes.
        self.ancestors: dict[fx.Node, set[fx.Node]] = {}
        for node in trace.graph.nodes:
            operands = self.operands(node)
            if (operands or node.op == "placeholder") and not _is_size(node):
                self.ancestors[node] = {node}.union(*(self.ancestors[o] for o in operands))

    @property
    def output(self) -> fx.Node:
        """The last value: what the module returns."""
        return next(reversed(self.ancestors))

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that depend on the module's input."""
        inputs = node.all_input_nodes
        if node.args and self.name(node) in _AS_ANOTHER:
            inputs = [i for i in inputs if i is node.args[0]]
        return [i for i in inputs if i in self.ancestors]

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The operations on the value of a node."""
        return [user for user in node.users if user in self.ancestors]

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls as a whole; None for a function or a method."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """The name of the operation: its module's class, its function or its method."""
        module = self.called(node)
        if module is not None:
            name: str = plain_class(module).__name__.lower()
            return name
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", node.target)).lower()
        return str(node.target) if node.op == "call_method" else ""

    def is_nonlinear(self, node: fx.Node) -> bool:
        """Whether the operation is an activation, a gate, or may be one."""
        name = self.name(node)
        unknown = node in self.trace.opaque and "drop" not in name
        return (
            unknown
            or name in ("sin", "cos")
            or any(part in name for part in NONLINEAR)
            or bool(self.gates(node))
        )

    def gates(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a product that are gates of the other operand."""
        if operation(node) not in _MULTIPLY:
            return []
        operands = self.operands(node)
        return [
            operand
            for operand in operands
            if self._is_gate(operand)
            or any(other in self.ancestors[operand] for other in operands if other is not operand)
        ]

    def _is_gate(self, node: fx.Node) -> bool:
        """Whether the node is a sigmoid or softmax, reshaped, or a value subtracted from one."""
        while not any(part in self.name(node) for part in _GATES):
            operands = self.operands(node)
            if self.name(node) in _SUBTRACT and len(operands) == 1:
                return True
            if self.name(node) not in _RESHAPE or not operands:
                return False
            node = operands[0]
        return True


def operation(node: fx.Node) -> Any:
    """The function or method that a node calls; None for a module."""
    return node.target if node.op in ("call_function", "call_method") else None


def _is_size(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.args[1] if node.target is getattr else node.target
    name = getattr(name, "__name__", str(name))
    return name in (*_SIZES, *_NEW_TENSORS) or name.startswith("new_")
