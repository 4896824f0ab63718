"""Trace one block of a network with torch.fx, without an input and without changing the block."""

import inspect
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .skeleton import skeleton

_ATTEMPTS = 8
_REPETITIONS = 1000  # of a condition that is taken to be true


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
    takes every condition to be false; each further path takes one more condition to be true. A
    condition is a place in the code: its answer is the same every time.

    Raises:
        Exception: no path can be traced; what the block's own code raised along the first path.
    """
    block = skeleton(block, lambda tensor: torch.empty_like(tensor, device="meta"))
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
        for asked in range(len(answers), len(tracer.conditions)):
            pending.append([*answers, *[False] * (asked - len(answers)), True])
    if len(errors) == attempts:
        raise errors[0]


class _Tracer(fx.Tracer):
    def __init__(
        self,
        answers: list[bool],
        is_leaf: Callable[[nn.Module], bool],
        is_optional: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__()
        self.answers = answers
        self.conditions: Counter[tuple[CodeType, int]] = Counter()
        self.is_leaf = is_leaf
        self.is_optional = is_optional
        self.callers: dict[fx.Node, tuple[str, ...]] = {}
        self.stack: tuple[str, ...] = ()
        self.opaque: set[fx.Node] = set()
        self.outputs: dict[str, list[fx.Node | None]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals["__name__"].startswith("torch.fx."):
            frame = frame.f_back
        condition = (frame.f_code, frame.f_lasti)
        self.conditions[condition] += 1
        position = list(self.conditions).index(condition)
        answer = position < len(self.answers) and self.answers[position]
        if answer and self.conditions[condition] > _REPETITIONS:
            raise RuntimeError("a loop on the input does not end")
        return answer

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Call the block without further arguments where its signature takes any number."""
        function, arguments = super().create_args_for_root(*args, **kwargs)
        further: dict[str, Any] = {"*": (), "**": {}}
        for i, argument in enumerate(arguments):
            name = str(argument.node.target) if isinstance(argument, fx.Proxy) else ""
            stars = name[: name.count("*")]
            if stars:
                arguments[i] = further[stars]
                self.graph.erase_node(argument.node)
        return function, arguments

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
        calls = self.module_stack.copy()
        self.stack = (*callers, path)
        try:
            output = super().call_module(m, forward, args, kwargs)
        except Exception:
            if not self.is_optional(m):
                raise
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            self.module_stack = calls  # torch.fx leaves the call that failed on it
            output = self.create_proxy("call_module", path, args, kwargs)
            self.opaque.add(output.node)
        finally:
            self.stack = callers
        self.outputs.setdefault(path, []).append(getattr(output, "node", None))
        return output
