"""The graph of values in a residual block, and the convolutions that end its branch.

- A residual add joins two tensors with a common ancestor. Exactly one operand, the branch, reaches
  back to spatial convolutions (kernel > 1) through a non-linearity. The way back does not pass
  through a gate (a factor of x that comes from a sigmoid, a softmax or x itself) or an attention
  product.
- A spatial convolution of the branch is a last one if no other of the branch depends on it.
"""

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .tracing import Trace

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SIZES = {"size", "dim", "numel", "shape", "ndim", "dtype", "device"}
# Operations that may lie between the sigmoid of a gate and the product. Each takes the tensor
# first.
_RESHAPE = {
    "contiguous", "expand", "expand_as", "getitem", "interpolate", "permute", "reshape", "rsub",
    "sub", "to", "transpose", "type_as", "unsqueeze", "view", "view_as",
}  # fmt: skip
# Substrings of the names of functions and modules, in lower case.
_GATES = ("sigmoid", "softmax")
_NONLINEAR = (
    *_GATES, "clamp", "elu", "glu", "mish", "shrink", "silu", "softplus", "softsign", "swish",
    "tanh", "threshold",
)  # fmt: skip
_ATTENTION = ("matmul", "bmm", "einsum", "attention")


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution of torch, or has the attributes of one."""
    return isinstance(module, nn.modules.conv._ConvNd) or all(
        hasattr(module, name) for name in ("weight", "in_channels", "kernel_size", "groups")
    )


def holds_spatial_convolution(module: nn.Module) -> bool:
    """Whether the module is or holds a convolution with a kernel > 1 that is not transposed."""
    return any(map(_is_spatial, module.modules()))


def _is_spatial(module: nn.Module) -> bool:
    if not is_convolution(module) or getattr(module, "transposed", False):
        return False
    size: Any = module.kernel_size
    return any(s > 1 for s in (size if isinstance(size, Iterable) else (size,)))


class Branch(NamedTuple):
    """The branch of a residual block.

    Attributes:
        last (list[fx.Node]): the last spatial convolutions.
        end (fx.Node): the operand of the add; in a block without an add, the value returned.
    """

    last: list[fx.Node]
    end: fx.Node


class BlockGraph:
    """The values of a block and their ancestors, along one path through its control flow."""

    def __init__(self, block: nn.Module, trace: Trace) -> None:
        self.block = block
        self.kind: Any = type(block)
        self.modules = dict(block.named_modules())
        self._holders = {n for n, m in self.modules.items() if holds_spatial_convolution(m)}
        self._opaque = trace.opaque
        self.trace = trace
        # Only nodes that depend on the values of the input: no parameters, no sizes.
        self._ancestors: dict[fx.Node, set[fx.Node]] = {}
        self._sums: dict[fx.Node, list[fx.Node]] = {}
        self._own_sums: list[fx.Node] = []
        for node in trace.graph.nodes:
            operands = self.operands(node)
            if (not operands and node.op != "placeholder") or _is_size(node):
                continue
            self._ancestors[node] = {node}.union(*(self._ancestors[o] for o in operands))
            if _operation(node) in _ADD and len(operands) > 1:
                self._sums[node] = operands
                if self._is_own(trace.callers[node]):
                    self._own_sums.append(node)

    def residual_branches(self) -> list[Branch]:
        """The branch of each residual add of the block itself."""
        found = []
        for node in self._own_sums:
            operands = self._sums[node]
            common = set.intersection(*(self._ancestors[operand] for operand in operands))
            if not any(map(_may_be_tensor, common)) or self._is_of_a_cell(node):
                continue
            sides = {operand: self._reach(operand, common) for operand in operands}
            branches = [end for end, side in sides.items() if self._is_branch(side, common)]
            shortcuts = [side for end, side in sides.items() if end not in branches]
            if len(branches) == 1 and not any(map(self.gates, chain(*shortcuts))):
                last = self._last(sides[branches[0]])
                if not self._are_summed(last):
                    found.append(Branch(last, branches[0]))
        return found

    def whole(self) -> Branch | None:
        """The block from input to output as a branch; None without a non-linearity."""
        output = next(reversed(self._ancestors))
        nodes = self._reach(output, set())
        if not any(map(self._is_nonlinear, nodes)):
            return None
        returned = self.operands(output)
        return Branch(self._last(nodes), returned[0] if len(returned) == 1 else output)

    def is_deep(self) -> bool:
        """Whether the block holds more than one convolution."""
        return sum(map(is_convolution, self.modules.values())) > 1

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that depend on the block's input."""
        return [i for i in node.all_input_nodes if i in self._ancestors]

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The operations on the value of a node."""
        return [user for user in node.users if user in self._ancestors]

    def _is_own(self, callers: tuple[str, ...]) -> bool:
        """Whether the block itself runs it, or a submodule that holds no spatial convolution."""
        return self._holders.isdisjoint(callers)

    def _reach(self, start: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
        """The ancestors of `start` back to `stop`, not through gates or attention products."""
        reached: set[fx.Node] = set()
        ahead = [start]
        while ahead:
            node = ahead.pop()
            if node not in reached and node not in stop:
                reached.add(node)
                if not self._is_attention(node):
                    gates = self.gates(node)
                    ahead += [operand for operand in self.operands(node) if operand not in gates]
        return reached

    def _is_branch(self, side: set[fx.Node], common: set[fx.Node]) -> bool:
        """Whether one side of an add is a branch: non-linear, with a spatial convolution.

        The convolution must depend on the common ancestor and on no other input of the block.
        Another input may join after it, as the time embedding of a diffusion model does, but not
        before it, as the hidden state of a recurrent cell does.
        """
        inputs = {node for node in self._ancestors if node.op == "placeholder"} - common
        return any(map(self._is_nonlinear, side)) and any(
            self._is_spatial(node) and not inputs & self._ancestors[node] for node in side
        )

    def _last(self, nodes: set[fx.Node]) -> list[fx.Node]:
        spatial = [node for node in self._ancestors if node in nodes and self._is_spatial(node)]
        return [
            node
            for node in spatial
            if not any(node in self._ancestors[other] for other in spatial if other is not node)
        ]

    def _is_of_a_cell(self, node: fx.Node) -> bool:
        """Whether the sum is concatenated with parallel sums, as in a NASNet cell."""
        joined = [user for user in node.users if _operation(user) in (torch.cat, torch.concat)]
        return any(
            other not in self._ancestors[node] and node not in self._ancestors[other]
            for other in chain(*map(self.operands, joined))
            if other in self._sums
        )

    def _are_summed(self, convolutions: list[fx.Node]) -> bool:
        """Whether a sum joins the convolutions before any non-linearity: they can be folded."""
        nonlinear = set(filter(self._is_nonlinear, self._ancestors))
        for summands in self._sums.values():
            sides = [self._reach(summand, nonlinear) for summand in summands]
            joined = [side.intersection(convolutions) for side in sides]
            if all(joined) and joined[0] != joined[1]:
                return True
        return False

    def _is_spatial(self, node: fx.Node) -> bool:
        return node.op == "call_module" and _is_spatial(self.modules[str(node.target)])

    def _is_nonlinear(self, node: fx.Node) -> bool:
        name = self.name(node)
        unknown = node in self._opaque and "drop" not in name
        return unknown or any(part in name for part in _NONLINEAR) or bool(self.gates(node))

    def _is_attention(self, node: fx.Node) -> bool:
        name = self.name(node)
        between_inputs = len(self.operands(node)) > 1
        return "softmax" in name or (between_inputs and any(part in name for part in _ATTENTION))

    def gates(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a product that are gates of the other operand."""
        if _operation(node) not in _MULTIPLY:
            return []
        operands = self.operands(node)
        return [
            operand
            for operand in operands
            if self._is_gate(operand)
            or any(other in self._ancestors[operand] for other in operands if other is not operand)
        ]

    def _is_gate(self, node: fx.Node) -> bool:
        """Whether the node is a sigmoid or softmax, reshaped or subtracted from a constant."""
        while not any(part in self.name(node) for part in _GATES):
            operands = self.operands(node)
            if self.name(node) not in _RESHAPE or not operands:
                return False
            node = operands[0]
        return True

    def name(self, node: fx.Node) -> str:
        """The name of the operation: its module's class, its function or its method."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__.lower()
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", node.target)).lower()
        return str(node.target) if node.op == "call_method" else ""


def _operation(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _is_size(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return name in _SIZES and node.op in ("call_function", "call_method")


def _may_be_tensor(node: fx.Node) -> bool:
    """False for an input that is only ever indexed: the items of a list have no common ancestor."""
    if node.op != "placeholder" or not node.users:
        return True
    return not all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)
