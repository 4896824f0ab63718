"""Trace one block of a network with torch.fx, without an input and without touching it."""

import copy
import inspect
from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

_ATTEMPTS = 8


class Trace:
    """The graph of a block, where each node was made, and which modules were kept whole.

    Every module is looked into but torch's own and those that `is_leaf` names, and those that
    cannot be traced and that `is_optional` allows to be kept whole, as `opaque` nodes.

    Raises:
        Exception: whatever the block's own code raises when it is run on symbols.
    """

    def __init__(
        self,
        block: nn.Module,
        is_leaf: Callable[[nn.Module], bool],
        is_optional: Callable[[nn.Module], bool],
    ) -> None:
        block = _skeleton(block)
        parameters = inspect.signature(block.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        # A condition on the input is first taken to be false. If that ends in an error, the
        # other ways follow: each list of answers is one way through the conditions.
        ways: deque[list[bool]] = deque([[]])
        errors: list[Exception] = []
        while ways and len(errors) < _ATTEMPTS:
            answers = ways.popleft()
            tracer = _Tracer(answers, is_leaf, is_optional)
            try:
                self.graph = tracer.trace(block, concrete_args=defaults or None)
            except Exception as error:  # the block's code may raise anything
                errors.append(error)
                for asked in range(len(answers), tracer.asked):
                    ways.append([*answers, *[False] * (asked - len(answers)), True])
            else:
                self.owner = tracer.owner
                self.opaque = tracer.opaque
                return
        raise errors[0]


def _skeleton(block: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without hooks or values in its tensors: free to be run."""
    tensors = chain(block.parameters(), block.buffers())
    clone = copy.deepcopy(block, {id(t): t if is_lazy(t) else _without_values(t) for t in tensors})
    clone.eval()
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
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
        self.owner: dict[fx.Node, str] = {}
        self.opaque: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        return self.asked <= len(self.answers) and self.answers[self.asked - 1]

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
            if not self.is_optional(m):
                raise
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            proxy = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            self.opaque.add(proxy.node)
            return proxy
