"""Run a model and record every operation on what depends on its input.

Operations are recorded as the code calls them: functions and methods of torch, and modules that the
caller takes for one operation each. Operators that run below these, in scripts for example, are
recorded by their names.
"""

import operator
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_GETITEM = ("call_function", operator.getitem)


@dataclass(eq=False)
class Value:
    """The result of an operation.

    Attributes:
        op (str), target (any): the kind and the target of its node in torch.fx.
        operands (list): values, and tensors that do not depend on the input.
        callers (tuple of nn.Module): the modules that were running, the outermost first.
    """

    op: str
    target: Any
    operands: list[Any] = field(default_factory=list)
    callers: tuple[nn.Module, ...] = ()


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        module (nn.Module): the module.
        depth (int): the number of modules that were running around it.
        values (slice), calls (slice): which values and which other calls belong to it.
        returned (list of Value or None): the values that it returned; None if it did not.
        output (Value or None): the value that it returned, if it is one tensor.
    """

    module: nn.Module
    depth: int
    values: slice
    calls: slice
    returned: list[Value] | None = None
    output: Value | None = None


class Recorder(TorchFunctionMode):
    """Runs a model and records its operations.

    Attributes:
        model (nn.Module): the model; its modules get a `forward` that reports every call.
        values (list of Value): the results of the operations, in order.
        calls (list of Call): the calls of modules, in the order in which they began.
        is_inside (bool): whether an operation that is being recorded runs.
    """

    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.model = model
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self._is_leaf = is_leaf
        self._is_of_torch = fx.Tracer().is_leaf_module
        self._value_of: MutableMapping[Tensor, Value] = WeakTensorKeyDictionary()
        self._running: tuple[nn.Module, ...] = ()
        self.is_inside = False
        for module in model.modules():
            module.__dict__["forward"] = partial(self._call, module, module.forward)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _tensors((args, kwargs)):
            self._value_of[tensor] = Value("placeholder", "input")
        with _UnseenOperations(self), self:
            self.model(*args, **kwargs)

    def record(self, op: str, target: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, and record it if it depends on the example."""
        operands = [self._value_of.get(tensor, tensor) for tensor in _tensors((args, kwargs))]
        self.is_inside = True
        try:
            output = function(*args, **kwargs)
        finally:
            self.is_inside = False
        if not any(isinstance(operand, Value) for operand in operands):
            return output
        if isinstance(output, Iterator):  # over a tensor
            output = list(output)
        changed = args[0] if function is Tensor.__setitem__ else output
        tensors = _tensors(changed)
        if tensors:
            value = self._add(op, target, operands)
            for tensor in tensors:
                is_item = tensor is not changed
                self._value_of[tensor] = self._add(*_GETITEM, [value]) if is_item else value
        return iter(output) if function is Tensor.__iter__ else output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.is_inside:
            return func(*args, **(kwargs or {}))
        return self.record(*_operation(func), func, args, kwargs or {})

    def _call(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_inside:
            return forward(*args, **kwargs)
        first_value, first_call, depth = len(self.values), len(self.calls) + 1, len(self._running)
        call = Call(module, depth, slice(0), slice(0))
        self.calls.append(call)
        self._running = (*self._running, module)
        try:
            if self._is_leaf(module) or self._is_of_torch(module, ""):
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

    def _add(self, op: str, target: Any, operands: list[Any]) -> Value:
        self.values.append(Value(op, target, operands, self._running))
        return self.values[-1]


class _UnseenOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports what runs below the functions of torch: operators called by name, and scripts."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.recorder.is_inside:
            return func(*args, **(kwargs or {}))
        return self.recorder.record(*_operation(func), func, args, kwargs or {})


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
