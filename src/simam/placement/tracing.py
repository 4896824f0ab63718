"""Trace one block of a network with torch.fx, without an input and without changing the block."""

import copy
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .. import hosts

_ATTEMPTS = 8


class Trace(NamedTuple):
    """The operations of a block along one path through its control flow.

    Attributes:
        graph (fx.Graph): the operations, in order.
        callers (dict[fx.Node, tuple[str, ...]]): the paths of the modules within the block whose
            forward ran the operation, from the outermost to the innermost.
        opaque (set[fx.Node]): calls of modules that could not be traced.
        outputs (dict[str, list]): the node that each call of a module returned, by the path of the
            module; None for what is no tensor.
    """

    graph: fx.Graph
    callers: dict[fx.Node, tuple[str, ...]]
    opaque: set[fx.Node]
    outputs: dict[str, list[fx.Node | None]]


def traces(
    block: nn.Module,
    is_leaf: Callable[[nn.Module], bool],
    is_optional: Callable[[nn.Module], bool],
) -> Iterator[Trace]:
    """Trace a block along every path through its conditions on the input, one after the other.

    Tracing enters every module except those of torch and those for which `is_leaf` is true. A
    module that cannot be traced becomes one opaque node if `is_optional` allows it. The first path
    takes every condition to be false; each further path takes one more condition to be true.

    Raises:
        Exception: no path can be traced; what the block's own code raised along the first path.
    """
    block = _skeleton(block)
    parameters = inspect.signature(block.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    pending: deque[list[bool]] = deque([[]])
    errors: list[Exception] = []
    attempts = 0
    while pending and attempts < _ATTEMPTS:
        attempts += 1
        answers = pending.popleft()
        tracer = _Tracer(answers, is_leaf, is_optional)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings raised on symbolic values are noise
                graph = tracer.trace(block, concrete_args=defaults or None)
        except Exception as error:  # the block's code may raise anything
            errors.append(error)
        else:
            yield Trace(graph, tracer.callers, tracer.opaque, tracer.outputs)
        for asked in range(len(answers), tracer.asked):
            pending.append([*answers, *[False] * (asked - len(answers)), True])
    if len(errors) == attempts:
        raise errors[0]


def _skeleton(block: nn.Module) -> nn.Module:
    """A copy without values, hooks and attached SimAM, in evaluation mode: safe to run."""
    tensors = chain(block.parameters(), block.buffers())
    clone = copy.deepcopy(block, {id(t): t if is_lazy(t) else _without_values(t) for t in tensors})
    clone.eval()
    for module in list(clone.modules()):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hosts.is_changed(module) and not hosts.class_was_changed_since(module):
            hosts.undo(module)
    return clone


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty


class _Tracer(fx.Tracer):
    def __init__(
        self,
        answers: list[bool],
        is_leaf: Callable[[nn.Module], bool],
        is_optional: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__()
        self.answers = answers
        self.asked = 0
        self.is_leaf = is_leaf
        self.is_optional = is_optional
        self.callers: dict[fx.Node, tuple[str, ...]] = {}
        self.stack: tuple[str, ...] = ()
        self.opaque: set[fx.Node] = set()
        self.outputs: dict[str, list[fx.Node | None]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        return self.asked <= len(self.answers) and self.answers[self.asked - 1]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.callers[node] = self.stack
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        before, callers = len(self.graph.nodes), self.stack
        self.stack = (*callers, path)
        try:
            output = super().call_module(m, forward, args, kwargs)
        except Exception:
            if not self.is_optional(m):
                raise
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            output = self.create_proxy("call_module", path, args, kwargs)
            self.opaque.add(output.node)
        finally:
            self.stack = callers
        self.outputs.setdefault(path, []).append(getattr(output, "node", None))
        return output
