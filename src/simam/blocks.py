"""Where a residual block's SimAM goes: after the last spatial convolutions of its branch.

Source: the authors' networks (Yang et al., ICML 2021, section 4), stated as a rule:

- A residual add joins two tensors with a common ancestor. One operand alone, the branch,
  reaches back to spatial convolutions (kernel > 1) through a non-linearity, without passing a
  gate (what multiplies after a sigmoid or softmax) or an attention product.
- SimAM goes after the branch's last spatial convolutions: those that no other depends on.
- A block whose skip is off because it changes the shape counts with the blocks of its kind.

Every candidate block is traced alone with torch.fx, which needs no input. A block that cannot
be traced costs only itself, and is reported.
"""

import ast
import copy
import inspect
import operator
import textwrap
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import fx, nn

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SIZES = {"size", "dim", "numel", "shape", "ndim", "dtype", "device"}
# What a gate may pass on its way from the sigmoid to the product; all take the tensor first.
_RESHAPE = {"view", "view_as", "reshape", "expand", "expand_as", "unsqueeze", "transpose",
            "permute", "contiguous", "to", "type_as", "rsub", "sub", "interpolate", "getitem"}  # fmt: skip
# Parts of the names of functions and modules, in lower case.
_GATES = ("sigmoid", "softmax")
_NONLINEAR = (*_GATES, "elu", "silu", "swish", "mish", "tanh", "softplus", "glu", "clamp")
_ATTENTION = ("softmax", "matmul", "bmm", "einsum", "attention")
_ATTEMPTS = 8


class Point(NamedTuple):
    """A convolution that SimAM follows, the residual block it ends, and why."""

    path: str
    block: str
    reason: str


class Unanalysed(NamedTuple):
    """A block that may be residual, and what kept it from being traced."""

    block: str
    reason: str


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution of torch's, or of anyone's that looks like one."""
    return isinstance(module, nn.modules.conv._ConvNd) or all(
        hasattr(module, name) for name in ("weight", "in_channels", "kernel_size", "groups")
    )


def find_points(model: nn.Module) -> tuple[list[Point], list[Unanalysed]]:
    """Apply the rule to every block of the model, without running or changing it."""
    points: dict[str, Point] = {}
    unanalysed: list[Unanalysed] = []
    residual_kinds: set[type] = set()
    others: list[tuple[str, _Flow]] = []

    def add(path: str, convolutions: list[str], what: str) -> None:
        kind = type(model.get_submodule(path)).__name__
        parallel = f" (1 of {len(convolutions)} in parallel)" if len(convolutions) > 1 else ""
        for convolution in convolutions:
            point = f"{path}.{convolution}" if path else convolution
            points[point] = Point(point, path, f"last spatial convolution{parallel} of {kind}{what}")

    for path, block in model.named_modules():
        if not _may_add(block):
            continue
        try:
            flow = _Flow(block)
        except Exception as error:  # the block's own code, run on symbols, may raise anything
            unanalysed.append(Unanalysed(path, f"{type(block).__name__}: {_summary(error)}"))
            continue
        branches = flow.residual_branches()
        if branches:
            residual_kinds.add(type(block))
        else:
            others.append((path, flow))
        for branch in branches:
            add(path, branch, "'s residual branch")

    adding_kinds = {type(flow.block) for _, flow in others if flow.own_sums}
    for path, flow in others:
        kind = type(flow.block)
        could_add = kind not in adding_kinds and flow.is_deep() and _adds_on_condition(kind)
        if kind in residual_kinds or could_add:
            add(path, flow.last_convolutions(), ", whose skip is off here")

    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    holders = [point.path for point in points.values()]
    return (
        sorted(points.values(), key=lambda point: order[point.path]),
        # The trouble of a container is not that of the residual blocks found in it.
        [u for u in unanalysed if not any(h.startswith(f"{u.block}.") or not u.block for h in holders)],
    )


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 90)}"


def _is_spatial(module: nn.Module) -> bool:
    if not is_convolution(module) or getattr(module, "transposed", False):
        return False
    size: Any = module.kernel_size
    return any(s > 1 for s in (size if isinstance(size, Iterable) else (size,)))


def _holds_spatial(module: nn.Module) -> bool:
    return any(map(_is_spatial, module.modules()))


def _may_add(block: nn.Module) -> bool:
    own_code = not type(block).__module__.startswith("torch.")
    return own_code and not is_convolution(block) and _adds(type(block)) and _holds_spatial(block)


@cache
def _adds(kind: type) -> bool:
    """Whether a method of the class, its constructor aside, contains an addition."""
    return any(
        _contains_addition(_syntax(method))
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for name, method in vars(base).items()
        if inspect.isfunction(method) and name != "__init__"
    )


@cache
def _adds_on_condition(kind: type) -> bool:
    """Whether the class's forward contains an addition that an `if` may leave out."""
    conditions = (n for n in ast.walk(_syntax(kind.forward)) if isinstance(n, ast.If | ast.IfExp))  # type: ignore[attr-defined]  # a module's class has a forward
    return any(map(_contains_addition, conditions))


def _syntax(method: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # no source to read: it may add
        return ast.parse("a + b if a else b")


def _contains_addition(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add))
        or (isinstance(node, ast.Attribute) and node.attr in _ADD)
        for node in ast.walk(tree)
    )


class _Tracer(fx.Tracer):
    """Traces through everything but torch's modules and convolutions.

    A truth value that depends on the input follows `choices`, then False. A module that cannot
    be traced is kept whole if it holds no spatial convolution.
    """

    def __init__(self, choices: tuple[bool, ...]) -> None:
        super().__init__()
        self.choices = choices
        self.asked = 0
        self.owner: dict[fx.Node, str] = {}
        self.opaque: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_convolution(m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        return self.asked <= len(self.choices) and self.choices[self.asked - 1]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owner[node] = self.scope.module_path
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if _holds_spatial(m):
                raise
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            proxy = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            self.opaque.add(proxy.node)
            return proxy


def _trace(block: nn.Module) -> tuple[fx.Graph, _Tracer]:
    """Trace the block, asking for another way where one of its conditions led to an error."""
    parameters = inspect.signature(block.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    ways: deque[tuple[bool, ...]] = deque([()])
    first_error: Exception | None = None
    for _ in range(_ATTEMPTS):
        if not ways:
            break
        tracer = _Tracer(ways.popleft())
        try:
            return tracer.trace(block, concrete_args=defaults or None), tracer
        except Exception as error:
            first_error = first_error or error
            for length in range(len(tracer.choices), tracer.asked):
                falses = (False,) * (length - len(tracer.choices))
                ways.append((*tracer.choices, *falses, True))
    assert first_error is not None
    raise first_error


def _skeleton(block: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without hooks, that shares the tensors: free to be run."""
    tensors = chain(block.parameters(), block.buffers())
    clone = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
    clone.eval()
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return clone


class _Flow:
    """What depends on what inside a block."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules = dict(block.named_modules())
        graph, tracer = _trace(_skeleton(block))
        self.opaque = tracer.opaque
        self.output = next(iter(reversed(graph.nodes)))
        self.sizes: set[fx.Node] = set()
        self.ancestors: dict[fx.Node, set[fx.Node]] = {}
        self.sums: dict[fx.Node, list[fx.Node]] = {}
        self.own_sums: list[fx.Node] = []
        for node in graph.nodes:
            if self._is_size(node):
                self.sizes.add(node)
            operands = self._operands(node)
            self.ancestors[node] = {node}.union(*(self.ancestors[o] for o in operands))
            summands = [operand for operand in operands if operand.op != "get_attr"]
            if _operation(node) in _ADD and len(summands) > 1:
                self.sums[node] = summands
                if self._is_own(tracer.owner[node]):
                    self.own_sums.append(node)

    def residual_branches(self) -> list[list[str]]:
        """The last spatial convolutions of the branch of each residual add of the block's own."""
        found = []
        for node in self.own_sums:
            common = set.intersection(*(self.ancestors[operand] for operand in self.sums[node]))
            if not any(map(_is_tensor, common)) or self._is_of_a_cell(node):
                continue
            sides = [self._reach(operand, common) for operand in self.sums[node]]
            branches = [side for side in sides if self._is_branch(side)]
            shortcuts = [side for side in sides if side not in branches]
            if len(branches) == 1 and not any(map(self._gates, chain(*shortcuts))):
                last = self._last(branches[0])
                if not self._are_summed(last):
                    found.append([str(convolution.target) for convolution in last])
        return found

    def last_convolutions(self) -> list[str]:
        """The last spatial convolutions on the way to the block's output."""
        return [str(node.target) for node in self._last(self._reach(self.output, set()))]

    def is_deep(self) -> bool:
        return sum(map(is_convolution, self.modules.values())) > 1

    def _is_size(self, node: fx.Node) -> bool:
        if node.op == "call_method" or node.target is getattr:
            name = node.args[1] if node.target is getattr else node.target
            return name in _SIZES
        inputs = node.all_input_nodes
        return node.op == "call_function" and bool(inputs) and self.sizes.issuperset(inputs)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [i for i in node.all_input_nodes if i not in self.sizes]

    def _is_own(self, owner: str) -> bool:
        """Whether the block itself, or a part without spatial convolutions, is at work."""
        while owner and not _holds_spatial(self.modules[owner]):
            owner = owner.rpartition(".")[0]
        return not owner

    def _reach(self, start: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
        """The nodes before `stop` whose values, not gates or attention, make up the start's."""
        reached: set[fx.Node] = set()
        ahead = [start]
        while ahead:
            node = ahead.pop()
            if node not in reached and node not in stop:
                reached.add(node)
                if not self._is_attention(node):
                    gates = self._gates(node)
                    ahead += [o for o in self._operands(node) if o not in gates]
        return reached

    def _is_branch(self, side: set[fx.Node]) -> bool:
        """Whether the side holds what to gate and is a function of the common ancestor alone."""
        return (
            any(map(self._is_spatial, side))
            and any(map(self._is_nonlinear, side))
            and not any(node.op == "placeholder" for node in side)
        )

    def _last(self, nodes: set[fx.Node]) -> list[fx.Node]:
        spatial = {node for node in nodes if self._is_spatial(node)}
        last = {n for n in spatial if not any(n in self.ancestors[o] for o in spatial - {n})}
        return [node for node in self.ancestors if node in last]

    def _is_of_a_cell(self, node: fx.Node) -> bool:
        """Whether the sum is concatenated with sums beside it, as in NASNet: no residual stream."""
        joined = [u for u in node.users if _operation(u) in (torch.cat, torch.concat)]
        return any(
            other not in self.ancestors[node] and node not in self.ancestors[other]
            for other in chain(*(self._operands(concatenation) for concatenation in joined))
            if other in self.sums
        )

    def _are_summed(self, convolutions: list[fx.Node]) -> bool:
        """Whether a sum joins them before any non-linearity, to be folded into one later."""
        stop = {node for node in self.ancestors if self._is_nonlinear(node)}
        for summands in self.sums.values():
            sides = [self._reach(summand, stop).intersection(convolutions) for summand in summands]
            if all(sides) and sides[0] != sides[1]:
                return True
        return False

    def _is_spatial(self, node: fx.Node) -> bool:
        return node.op == "call_module" and _is_spatial(self.modules[str(node.target)])

    def _is_nonlinear(self, node: fx.Node) -> bool:
        name = self._name(node)
        return any(part in name for part in _NONLINEAR) or (
            node in self.opaque and "drop" not in name
        )

    def _is_attention(self, node: fx.Node) -> bool:
        if not any(part in self._name(node) for part in _ATTENTION):
            return False
        inputs = [o for o in self._operands(node) if o.op != "get_attr"]
        return "softmax" in self._name(node) or len(inputs) > 1

    def _gates(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a product that come from a sigmoid or softmax."""
        if _operation(node) not in _MULTIPLY:
            return []
        return [operand for operand in self._operands(node) if self._is_gate(operand)]

    def _is_gate(self, node: fx.Node) -> bool:
        while not any(part in self._name(node) for part in _GATES):
            operands = self._operands(node)
            if self._name(node) not in _RESHAPE or not operands:
                return False
            node = operands[0]
        return True

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__.lower()
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", node.target)).lower()
        return str(node.target) if node.op == "call_method" else ""


def _operation(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _is_tensor(node: fx.Node) -> bool:
    """Whether the node may be a tensor: neither a parameter nor a list of inputs."""
    if node.op == "placeholder":
        items = [u for u in node.users if u.target is operator.getitem]
        return len(items) < len(node.users) or not all(isinstance(i.args[1], int) for i in items)
    return node.op != "get_attr"
