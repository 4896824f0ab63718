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
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import fx, nn

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
from .sums import UPSAMPLING
from .tracing import Trace

ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONCATENATE = {torch.cat, torch.concat}
# Substrings of the names of functions and modules, in lower case.
_ATTENTION = ("matmul", "bmm", "einsum", "attention")


class Branch(NamedTuple):
    """The branch of a residual block.

    Attributes:
        last (list[fx.Node]): the last spatial convolutions.
        end (fx.Node): the operand of the add; in a block without an add, the value returned.
        nodes (set[fx.Node]): all values of the branch.
        starts (set[fx.Node]): what the other operand of the add is computed from, outside of the
            branch.
        is_upsampled (bool): whether all of the branch passes through an upsampling.
    """

    last: list[fx.Node]
    end: fx.Node
    nodes: set[fx.Node]
    starts: set[fx.Node]
    is_upsampled: bool


class BlockGraph(Graph):
    """The values of a block, and its residual branches."""

    def __init__(self, block: nn.Module, trace: Trace) -> None:
        super().__init__(block, trace)
        self.block = block
        self.kind = plain_class(block)
        self._holders = {n for n, m in self.modules.items() if holds_spatial_convolution(m)}
        self._upsampled = set(filter(self._upsamples, self.ancestors))
        self._sums = {
            node: self.operands(node)
            for node in self.ancestors
            if operation(node) in ADD and len(self.operands(node)) == 2
        }

    @cached_property
    def branches(self) -> list[Branch]:
        """The branch of each residual add of the block itself."""
        return self.branches_like(())

    def branches_like(self, paths: Collection[str]) -> list[Branch]:
        """The branch of each residual add, also where the shortcut is non-linear, too.

        Args:
            paths (collection of str): the modules in the branch of other blocks of this class. They
                tell the branch from such a shortcut.
        """
        found = []
        for node, (first, second) in self._sums.items():
            common = self.ancestors[first] & self.ancestors[second]
            is_own = self._holders.isdisjoint(self.trace.callers[node])
            if not (is_own and any(map(_may_be_tensor, common))) or self._is_of_a_cell(node):
                continue
            sides = [self._side(first, second, common), self._side(second, first, common)]
            branches = [side for side in sides if self._is_branch(side)]
            if len(branches) == 2:
                branches = _most_like(branches, paths)
            if len(branches) == 1:
                (branch,) = branches
                (shortcut,) = (side for side in sides if side is not branch)
                is_gated = any(map(self.gates, shortcut.nodes))
                is_of_one_stream = branch.is_upsampled == shortcut.is_upsampled
                last = self._last(branch.nodes)
                if is_of_one_stream and not is_gated and not self._are_summed(last):
                    found.append(branch._replace(last=last))
        return found

    def _side(self, end: fx.Node, other: fx.Node, common: set[fx.Node]) -> Branch:
        """One side of an add, as a branch beside the other operand; its last are not known yet."""
        nodes, shortcut = self._reach(end, common), self._reach(other, common)
        starts = common.intersection([other, *chain(*map(self.operands, shortcut))])
        return Branch([], end, nodes, starts, self._is_upsampled(end, common))

    def _is_upsampled(self, end: fx.Node, common: set[fx.Node]) -> bool:
        """Whether a value depends on common ancestors only through an upsampling."""
        upsampled = self._upsampled - common
        if not upsampled:
            return False
        near = self._reach(end, upsampled | common)
        stops = {end, *chain(*map(self.operands, near))}
        return common.isdisjoint(stops) and not upsampled.isdisjoint(stops)

    def _upsamples(self, node: fx.Node) -> bool:
        module = self.called(node)
        if module is not None and getattr(module, "transposed", False):
            return max(kernel_size(module)) > 1
        return any(part in self.name(node) for part in UPSAMPLING)

    def whole(self) -> Branch | None:
        """The block from input to output as a branch.

        None without a non-linearity, and where a part of the block adds: it is a stage then.
        """
        nodes = self._reach(self.output, set())
        if not self._has_nonlinearity(nodes) or any(map(self.trace.callers.get, self._sums)):
            return None
        returned = self.operands(self.output)
        end = returned[0] if len(returned) == 1 else self.output
        return Branch(self._last(nodes), end, nodes, starts=set(), is_upsampled=False)

    def is_deep(self) -> bool:
        """Whether the block holds more than one convolution."""
        parts = parts_of_adapters(self.block)
        return sum(is_convolution(m) and m not in parts for m in self.modules.values()) > 1

    def is_within_a_stage(self, branch: Branch, inner: set[str]) -> bool:
        """Whether a branch of a whole network goes from block to block at one resolution.

        It begins with a block, not with the first convolution of the network. In the code of the
        network it concatenates nothing, and it runs no other part with several convolutions.

        Args:
            branch (Branch): a branch of a network.
            inner (set of str): the paths of the residual blocks in the network.
        """
        if branch.is_upsampled or not inner:
            return not branch.is_upsampled
        around = {path[:i] for path in inner for i, c in enumerate(f"{path}.") if c == "."}
        others = {p for p, m in self.modules.items() if p not in around and _has_several(m)}
        in_blocks = {n for n in branch.nodes if not inner.isdisjoint(self.trace.callers[n])}
        for node in branch.nodes - in_blocks:
            callers = self.trace.callers[node]
            is_first = self._is_spatial(node) and any(node in self.ancestors[n] for n in in_blocks)
            concatenates = not callers and operation(node) in _CONCATENATE
            if is_first or concatenates or not others.isdisjoint(callers):
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

    def _is_branch(self, side: Branch) -> bool:
        """Whether one side of an add is a branch: non-linear, with a spatial convolution.

        The convolution must depend on what the shortcut starts from. Another value may join before
        it by addition or multiplication, as a mask or the time step of a diffusion model does. By
        concatenation it may not: then the branch is a function of several streams, as in a
        recurrent cell with its hidden state.
        """
        return self._has_nonlinearity(side.nodes) and any(
            self._is_spatial(node)
            and not side.starts.isdisjoint(self.ancestors[node])
            and not self._concatenates_another(self.ancestors[node] & side.nodes, side.starts)
            for node in side.nodes
        )

    def _concatenates_another(self, nodes: set[fx.Node], starts: set[fx.Node]) -> bool:
        """Whether a node concatenates a value that does not depend on some values."""
        operands = chain(*(self.operands(n) for n in nodes if operation(n) in _CONCATENATE))
        return any(starts.isdisjoint(self.ancestors[operand]) for operand in operands)

    def _last(self, nodes: set[fx.Node]) -> list[fx.Node]:
        spatial = [node for node in self.ancestors if node in nodes and self._is_spatial(node)]
        return [
            node
            for node in spatial
            if not any(node in self.ancestors[other] for other in spatial if other is not node)
        ]

    def _is_of_a_cell(self, node: fx.Node) -> bool:
        """Whether the sum is concatenated with parallel sums, as in a NASNet cell."""
        joined = [user for user in node.users if operation(user) in _CONCATENATE]
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


def _most_like(branches: list[Branch], paths: Collection[str]) -> list[Branch]:
    """The branches that run most of some modules."""
    counts = [sum(str(node.target) in paths for node in branch.nodes) for branch in branches]
    return [b for b, n in zip(branches, counts, strict=True) if n == max(counts) > 0]


def _has_several(module: nn.Module) -> bool:
    """Whether a module with a forward of its own holds several spatial convolutions."""
    is_own = not isinstance(module, nn.Sequential | nn.ModuleList)
    return is_own and sum(map(is_spatial, module.modules())) > 1


def _has_own_nonlinearity(convolution: nn.Module) -> bool:
    return any("norm" not in name.lower() for name in behind_convolution(convolution).names)


def _may_be_tensor(node: fx.Node) -> bool:
    """False for an input that is only ever indexed: the items of a list have no common ancestor."""
    if node.op != "placeholder" or not node.users:
        return True
    return not all(u.target is operator.getitem and isinstance(u.args[-1], int) for u in node.users)
