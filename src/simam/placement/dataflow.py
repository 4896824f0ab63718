"""The graph of values in a residual block, and the convolutions that end its branch.

- A residual add joins two tensors with a common ancestor. Exactly one operand, the branch, reaches
  back to spatial convolutions (kernel > 1) through a non-linearity. The way back does not pass
  through a gate (a factor of x that comes from a sigmoid, a softmax or x itself) or an attention
  product.
- Both operands belong to one stream: a sum of a map with an upsampled one joins two resolutions.
- A spatial convolution of the branch is a last one if no other of the branch depends on it.
"""

import operator
from collections.abc import Collection
from itertools import chain
from typing import NamedTuple

import torch
from torch import fx, nn

from .candidates import UPSAMPLING
from .convolutions import (
    holds_spatial_convolution,
    is_convolution,
    is_spatial,
    kernel_size,
    parts_of_adapters,
    plain_class,
)
from .graph import Graph, operation
from .own_forward import behind_convolution
from .tracing import Trace

ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Substrings of the names of functions and modules, in lower case.
_ATTENTION = ("matmul", "bmm", "einsum", "attention")


class Branch(NamedTuple):
    """The branch of a residual block.

    Attributes:
        last (list[fx.Node]): the last spatial convolutions.
        end (fx.Node): the operand of the add; in a block without an add, the value returned.
        nodes (set[fx.Node]): all values of the branch.
        is_upsampled (bool): whether both operands of the add are upsampled.
    """

    last: list[fx.Node]
    end: fx.Node
    nodes: set[fx.Node]
    is_upsampled: bool = False


class BlockGraph(Graph):
    """The values of a block, and its residual branches."""

    def __init__(self, block: nn.Module, trace: Trace) -> None:
        super().__init__(block, trace)
        self.block = block
        self.kind = plain_class(block)
        self._holders = {n for n, m in self.modules.items() if holds_spatial_convolution(m)}
        self._sums = {
            node: self.operands(node)
            for node in self.ancestors
            if operation(node) in ADD and len(self.operands(node)) > 1
        }

    def residual_branches(self, like: Collection[str] = ()) -> list[Branch]:
        """The branch of each residual add of the block itself.

        Args:
            like (collection of str): paths of the modules in the branch of other blocks of this
                class. They tell the branch from a shortcut that is non-linear, too.
        """
        found = []
        for node, operands in self._sums.items():
            common = set.intersection(*(self.ancestors[operand] for operand in operands))
            is_own = self._holders.isdisjoint(self.trace.callers[node])
            if not (is_own and any(map(_may_be_tensor, common))) or self._is_of_a_cell(node):
                continue
            sides = {operand: self._reach(operand, common) for operand in operands}
            branches = [end for end in operands if self._is_branch(end, operands, common)]
            if len(branches) > 1:
                branches = self._most_like(branches, sides, like)
            shortcuts = chain(*(side for end, side in sides.items() if end not in branches))
            if len(branches) != 1 or any(map(self.gates, shortcuts)):
                continue
            end, side = branches[0], sides[branches[0]]
            last = self._last(side)
            is_upsampled = {self._is_upsampled(operand, common) for operand in operands}
            if len(is_upsampled) == 1 and not self._are_summed(last):
                found.append(Branch(last, end, side, is_upsampled.pop()))
        return found

    def _most_like(
        self, ends: list[fx.Node], sides: dict[fx.Node, set[fx.Node]], like: Collection[str]
    ) -> list[fx.Node]:
        """The sides of a sum that run most of some modules."""
        counts = {end: sum(str(node.target) in like for node in sides[end]) for end in ends}
        return [end for end in ends if counts[end] == max(counts.values()) > 0]

    def _is_upsampled(self, operand: fx.Node, common: set[fx.Node]) -> bool:
        """Whether an operand of a sum depends on common ancestors only through an upsampling."""
        upsampled = set(filter(self._upsamples, self.ancestors)) - common
        near = self._reach(operand, upsampled | common)
        stops = {operand, *chain(*map(self.operands, near))}
        return common.isdisjoint(stops) and not upsampled.isdisjoint(stops)

    def _upsamples(self, node: fx.Node) -> bool:
        module = self.called(node)
        is_transposed = getattr(module, "transposed", False) and max(kernel_size(module)) > 1
        return is_transposed or any(part in self.name(node) for part in UPSAMPLING)

    def whole(self) -> Branch | None:
        """The block from input to output as a branch; None without a non-linearity."""
        nodes = self._reach(self.output, set())
        if not self._has_nonlinearity(nodes):
            return None
        returned = self.operands(self.output)
        end = returned[0] if len(returned) == 1 else self.output
        return Branch(self._last(nodes), end, nodes)

    def is_deep(self) -> bool:
        """Whether the block holds more than one convolution."""
        parts = parts_of_adapters(self.block)
        return sum(is_convolution(m) and m not in parts for m in self.modules.values()) > 1

    def is_within_a_stage(self, branch: Branch, inner: Collection[str]) -> bool:
        """Whether a branch is not upsampled, and runs residual blocks only one after another.

        Args:
            branch (Branch): a branch of a whole network.
            inner (collection of str): the paths of the residual blocks in the network.
        """
        if branch.is_upsampled:
            return False
        parts = {path for path, module in self.modules.items() if path and _is_part(module)}
        for node in branch.nodes if inner else ():
            callers = self.trace.callers[node]
            outermost = next((p for p in callers if p in parts or p in inner), None)
            joins = not callers and operation(node) in (torch.cat, torch.concat)
            if joins or outermost not in (None, *inner):
                return False
        return True

    def touches(self, branch: Branch, path: str) -> bool:
        """Whether a module of the block acts in a branch, behind it, or on the block's input.

        With another spatial convolution in between, it belongs to another part of the block. A
        module that no operation comes from may act in a way that the trace does not show.
        """
        nodes = [node for node in self.ancestors if self._is_of(node, path)]
        behind = list(branch.last)
        for node in behind:
            behind += [u for u in self.users(node) if not self._is_spatial(u) and u not in behind]
        return not nodes or any(
            node in branch.nodes
            or node in behind
            or not any(map(self._is_spatial, self.ancestors[node]))
            for node in nodes
        )

    def _is_of(self, node: fx.Node, path: str) -> bool:
        """Whether a module runs an operation, or is part of an untraceable one."""
        callers = self.trace.callers[node]
        is_part = node in self.trace.opaque and f"{path}.".startswith(f"{callers[-1]}.")
        return path in callers or is_part

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

    def _is_branch(
        self, end: fx.Node, operands: list[fx.Node], common: set[fx.Node]
    ) -> bool:
        """Whether one operand of an add ends a branch: non-linear, with a spatial convolution.

        The convolution must depend on the values that the shortcut starts from, and on no others.
        Another input may join after it, as the time embedding of a diffusion model does, but not
        before it, as the hidden state of a recurrent cell does, or the images of a coarser level.
        """
        side = self._reach(end, common)
        inputs = {node for node in self.ancestors if node.op == "placeholder"} - common
        starts = {*chain(*(self._entries(o, common) for o in operands if o is not end))}
        return self._has_nonlinearity(side) and any(
            self._is_spatial(node)
            and not inputs & self.ancestors[node]
            and self._entries(node, common) <= starts
            for node in side
        )

    def _entries(self, operand: fx.Node, common: set[fx.Node]) -> set[fx.Node]:
        """The common ancestors that an operand of an add is computed from."""
        side = self._reach(operand, common)
        return common.intersection([operand, *chain(*map(self.operands, side))])

    def _last(self, nodes: set[fx.Node]) -> list[fx.Node]:
        spatial = [node for node in self.ancestors if node in nodes and self._is_spatial(node)]
        return [
            node
            for node in spatial
            if not any(node in self.ancestors[other] for other in spatial if other is not node)
        ]

    def _is_of_a_cell(self, node: fx.Node) -> bool:
        """Whether the sum is concatenated with parallel sums, as in a NASNet cell."""
        joined = [user for user in node.users if operation(user) in (torch.cat, torch.concat)]
        return any(
            other not in self.ancestors[node] and node not in self.ancestors[other]
            for other in chain(*map(self.operands, joined))
            if other in self._sums
        )

    def _are_summed(self, convolutions: list[fx.Node]) -> bool:
        """Whether a convolution is one of two linear summands that convolve the same values.

        Such summands can be folded into one convolution, as RepVGG and MobileOne do.
        """
        nonlinear = {node for node in self.ancestors if self._has_nonlinearity({node})}
        for summands in self._sums.values():
            sides = [self._reach(summand, nonlinear) for summand in summands]
            if set(convolutions).isdisjoint(chain(*sides)):
                continue
            shared = set.intersection(*sides)
            is_convolved = [any(map(self._is_convolution, side - shared)) for side in sides]
            sources = [
                {summand, *chain(*map(self.operands, side))} & nonlinear
                | {node for node in side if not self.operands(node)}
                for summand, side in zip(summands, sides, strict=True)
            ]
            if all(is_convolved) and sources[0] == sources[1]:
                return True
        return False

    def _has_nonlinearity(self, nodes: set[fx.Node]) -> bool:
        """Whether an operation is not linear, on its own or inside a convolution."""
        modules = (m for m in map(self.called, nodes) if m is not None and is_convolution(m))
        return any(map(self.is_nonlinear, nodes)) or any(map(_has_own_nonlinearity, modules))

    def _is_convolution(self, node: fx.Node) -> bool:
        module = self.called(node)
        return module is not None and is_convolution(module)

    def _is_spatial(self, node: fx.Node) -> bool:
        module = self.called(node)
        return module is not None and is_spatial(module)

    def _is_attention(self, node: fx.Node) -> bool:
        name = self.name(node)
        between_inputs = len(self.operands(node)) > 1
        return "softmax" in name or (between_inputs and any(part in name for part in _ATTENTION))


def _is_part(module: nn.Module) -> bool:
    """Whether a module has code of its own, and several spatial convolutions."""
    is_own = not isinstance(module, nn.Sequential | nn.ModuleList)
    return is_own and sum(map(is_spatial, module.modules())) > 1


def _has_own_nonlinearity(convolution: nn.Module) -> bool:
    return any("norm" not in name.lower() for name in behind_convolution(convolution).names)


def _may_be_tensor(node: fx.Node) -> bool:
    """False for an input that is only ever indexed: the items of a list have no common ancestor."""
    if node.op != "placeholder" or not node.users:
        return True
    return not all(u.target is operator.getitem and isinstance(u.args[-1], int) for u in node.users)
