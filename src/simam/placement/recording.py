"""Record the operations of a model that runs once on an example.

A copy of the model runs on fake tensors, which have a shape and a dtype but no values, so nothing
is computed. Every operation on what depends on the example is recorded, with the modules that were
running. The code of the model may do in Python what it likes, except read a value: there the run
on fake tensors stops, and a run on the example itself is needed.
"""

import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..messages import one_line
from .skeleton import skeleton
from .tracing import Trace

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]

_CALLS = 8  # calls of one block that are looked at
# Wrappers around a whole model: they pass their arguments on to the module in this attribute.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


@dataclass(eq=False)
class _Value:
    """The result of an operation: the kind and the target of its node in torch.fx, its operands
    (values, and tensors that do not depend on the example), and the modules that were running."""

    op: str
    target: Any
    operands: list[Any] = field(default_factory=list)
    callers: tuple[nn.Module, ...] = ()


@dataclass(eq=False)
class _Call:
    """One call of a module: the values and the calls within it, and the values it returned."""

    module: nn.Module
    depth: int
    values: slice
    calls: slice
    returned: list[_Value] | None = None
    output: _Value | None = None


class Recording:
    """What happened in one run of a model.

    Attributes:
        reads_values (bool): whether the run stopped because the model reads a value in Python.
            Modules that had returned by then are recorded.
    """

    def __init__(self, model: nn.Module, recorder: "_Recorder", reads_values: bool) -> None:
        self.reads_values = reads_values
        self._recorder = recorder
        copies = dict(recorder.model.named_modules())
        self._copies = {m: copies[p] for p, m in model.named_modules() if p in copies}

    def traces(self, block: nn.Module, *, unfinished: bool) -> Iterator[Trace]:
        """The operations of each call of a block.

        Args:
            block (nn.Module): a module of the model.
            unfinished (bool): whether a call counts within which the run stopped.
        """
        copied = self._copies.get(block)
        calls = (c for c in self._recorder.calls if c.module is copied)
        counting = (c for c in calls if unfinished or c.returned is not None)
        yield from map(self._trace, islice(counting, _CALLS))

    def blocks_with(
        self, operations: set[Any], holds: Callable[[nn.Module], bool]
    ) -> set[nn.Module]:
        """The innermost modules with a property that were running when some operations joined
        two values that depend on the example."""
        originals = {c: m for m, c in self._copies.items()}
        found = set()
        for value in self._recorder.values:
            joins = sum(isinstance(operand, _Value) for operand in value.operands) > 1
            if joins and value.op != "call_module" and value.target in operations:
                found.add(next(filter(holds, reversed(value.callers)), None))
        return {originals[module] for module in found if module is not None}

    def _trace(self, call: _Call) -> Trace:
        names = {module: path for path, module in call.module.named_modules()}
        tensors = chain(call.module.named_parameters(), call.module.named_buffers())
        tensor_names = {id(tensor): name for name, tensor in tensors}
        graph = fx.Graph()
        nodes: dict[Any, fx.Node] = {}
        callers: dict[fx.Node, tuple[str, ...]] = {}

        def node_of(operand: Any) -> fx.Node | None:
            if operand not in nodes:  # it comes from outside of the call
                if isinstance(operand, _Value):
                    node = graph.create_node("placeholder", "input")
                elif id(operand) in tensor_names:
                    node = graph.create_node("get_attr", tensor_names[id(operand)])
                else:  # a tensor that belongs to no module
                    return None
                nodes[operand], callers[node] = node, ()
            return nodes[operand]

        for value in self._recorder.values[call.values]:
            target = names[value.target] if value.op == "call_module" else value.target
            node = graph.create_node(value.op, target, tuple(map(node_of, value.operands)))
            nodes[value] = node
            inner = value.callers[call.depth + 1 :]
            callers[node] = tuple(names[module] for module in inner if module in names)
        callers[graph.output(tuple(map(node_of, call.returned or [])))] = ()
        outputs: dict[str, list[fx.Node | None]] = {}
        for each in self._recorder.calls[call.calls]:
            if each.module in names:
                output = nodes.get(each.output)
                outputs.setdefault(names[each.module], []).append(output)
        return Trace(graph, callers, set(), outputs)


def record(
    model: nn.Module,
    example: Example,
    is_leaf: Callable[[nn.Module], bool],
    *,
    with_values: bool = False,
) -> Recording:
    """Run a copy of a model once and record its operations; the model does not change.

    Args:
        model (nn.Module): the model.
        example (Tensor, tuple, or mapping): its input, its arguments or its keyword arguments.
        is_leaf (callable): whether a module is recorded as one operation. Torch's own always are.
        with_values (bool): run on the values of the model and of the example, on the CPU.

    Raises:
        TypeError: the example has another type.
        ValueError: the model cannot be run on the example.
    """
    from torch._subclasses import fake_tensor

    unreadable = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    )
    arguments = _arguments(example)
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_random_states_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # warnings of a run that nobody asked for are noise
        if not with_values:
            stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        convert = _on_cpu if with_values else _without_values
        recorder = _Recorder(skeleton(model, convert), is_leaf)
        try:
            recorder.run(*tree_map_only(Tensor, convert, arguments))
        except unreadable:
            return Recording(model, recorder, reads_values=True)
        except Exception as error:  # the model's code may raise anything, not only on fake tensors
            if with_values or not holds_values(example):
                raise ValueError(
                    f"could not run this {type(model).__name__} on the example: "
                    f"{one_line(error, 200)}. An example is what the model takes: a tensor, a tuple "
                    "of arguments, or a dict of keyword arguments"
                ) from error
        else:
            return Recording(model, recorder, reads_values=False)
    return record(model, example, is_leaf, with_values=True)


def holds_values(example: Example) -> bool:
    """Whether a model that reads values in Python can run on the example: no tensor is on meta."""
    return not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(_arguments(example)))


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise TypeError(
        "example must be a tensor, a tuple of arguments, or a dict of keyword arguments, "
        f"got {type(example).__name__}"
    )


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(state)


class _Recorder(TorchFunctionMode):
    """Runs a model and records its operations.

    Attributes:
        model (nn.Module): the model; its modules get a `forward` that reports every call.
        values (list of _Value): the results of the operations, in order.
        calls (list of _Call): the calls of modules, in the order in which they began.
    """

    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.model = model
        self.values: list[_Value] = []
        self.calls: list[_Call] = []
        self._is_leaf = is_leaf
        self._value_of = WeakTensorKeyDictionary()
        self._running: tuple[nn.Module, ...] = ()
        self._is_inside = False  # of an operation that is being recorded
        for module in model.modules():
            module.__dict__["forward"] = partial(self._call, module, module.forward)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _tensors((args, kwargs)):
            self._value_of[tensor] = _Value("placeholder", "input")
        with _UnseenOperations(self), self:
            self.model(*args, **kwargs)

    def record(self, op: str, target: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, and record it if it depends on the example."""
        operands = [self._value_of.get(tensor, tensor) for tensor in _tensors((args, kwargs))]
        self._is_inside = True
        try:
            output = function(*args, **kwargs)
        finally:
            self._is_inside = False
        if not any(isinstance(operand, _Value) for operand in operands):
            return output
        if isinstance(output, Iterator):  # over a tensor
            output = list(output)
        changed = args[0] if function is Tensor.__setitem__ else output
        tensors = _tensors(changed)
        if tensors:
            value = self._add(op, target, operands)
            for tensor in tensors:
                item = [] if changed is tensor else [self._add(*_GETITEM, [value])]
                self._value_of[tensor] = next(iter(item), value)
        return iter(output) if function is Tensor.__iter__ else output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._is_inside:
            return func(*args, **(kwargs or {}))
        return self.record(*_operation(func), func, args, kwargs or {})

    def _call(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:
            return forward(*args, **kwargs)
        first_value, first_call, depth = len(self.values), len(self.calls) + 1, len(self._running)
        call = _Call(module, depth, slice(0), slice(0))
        self.calls.append(call)
        self._running = (*self._running, module)
        try:
            if self._is_leaf(module) or fx.Tracer().is_leaf_module(module, ""):
                output = self.record("call_module", module, forward, args, kwargs)
            else:
                output = forward(*args, **kwargs)
        finally:
            self._running = self._running[:-1]
            call.values = slice(first_value, len(self.values))
            call.calls = slice(first_call, len(self.calls))
        call.returned = [v for v in map(self._value_of.get, _tensors(output)) if v is not None]
        if isinstance(output, Tensor):
            call.output = self._value_of.get(output)
        return output

    def _add(self, op: str, target: Any, operands: list[Any]) -> _Value:
        self.values.append(_Value(op, target, operands, self._running))
        return self.values[-1]


class _UnseenOperations(TorchDispatchMode):
    """Reports what runs below the functions of torch: operators called by name, and scripts."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.recorder._is_inside:
            return func(*args, **(kwargs or {}))
        return self.recorder.record(*_operation(func), func, args, kwargs or {})


_GETITEM = ("call_function", operator.getitem)


def _operation(function: Any) -> tuple[str, Any]:
    """The kind and the target of the node that torch.fx would have for a function of torch."""
    if isinstance(function, OpOverload | OpOverloadPacket):
        return "call_method", getattr(function, "overloadpacket", function).__name__
    name = function.__name__
    if name in ("__get__", "__set__"):
        return "call_method", function.__self__.__name__
    if name.startswith("__"):
        name = name.strip("_")
        known = getattr(operator, name, None) or getattr(operator, name.removeprefix("r"), None)
        return ("call_function", known) if known else ("call_method", name)
    is_method = getattr(Tensor, name, None) is function
    return ("call_method", name) if is_method else ("call_function", function)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
