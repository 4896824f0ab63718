"""The operations of a model in one run on an example, and their graph for each block.

A copy of the model runs on fake tensors, which have a shape and a dtype but no values, so nothing
is computed. The code of the model may do in Python what it likes, except read a value: there this
run stops, and a run on the example itself is needed.
"""

import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ..messages import one_line
from .example import Example, arguments, holds_values
from .recorder import Call, Recorder, Value
from .skeleton import skeleton
from .tracing import Trace

_CALLS = 8  # calls of one block that are looked at
# Wrappers around a whole model: they pass their arguments on to the module in this attribute.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


class Recording:
    """What happened in one run of a model.

    Attributes:
        reads_values (bool): whether the run stopped because the model reads a value in Python.
            Modules that had returned by then are recorded.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, reads_values: bool) -> None:
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
        """The innermost modules with a property around operations that join two values.

        Args:
            operations (set): functions, and names of methods.
            holds (callable): whether a module has the property.
        """
        originals = {c: m for m, c in self._copies.items()}
        found = set()
        for value in self._recorder.values:
            joins = sum(isinstance(operand, Value) for operand in value.operands) > 1
            if joins and value.op != "call_module" and value.target in operations:
                found.add(next(filter(holds, reversed(value.callers)), None))
        return {originals[module] for module in found if module is not None}

    def _trace(self, call: Call) -> Trace:
        names = {module: path for path, module in call.module.named_modules()}
        tensors = chain(call.module.named_parameters(), call.module.named_buffers())
        tensor_names = {id(tensor): name for name, tensor in tensors}
        graph = fx.Graph()
        nodes: dict[Any, fx.Node] = {}
        callers: dict[fx.Node, tuple[str, ...]] = {}

        def node_of(operand: Any) -> fx.Node | None:
            if operand not in nodes:  # it comes from outside of the call
                if isinstance(operand, Value):
                    node = graph.create_node("placeholder", "input")
                elif id(operand) in tensor_names:
                    node = graph.create_node("get_attr", tensor_names[id(operand)])
                else:  # a tensor that belongs to no module
                    return None
                nodes[operand], callers[node] = node, ()
            return nodes[operand]

        for value in self._recorder.values[call.values]:
            op, target = value.op, value.target
            if op == "call_module":  # a module from outside of the block is like a function
                op = "call_module" if target in names else "call_function"
                target = names.get(target, type(target))
            node = graph.create_node(op, target, tuple(map(node_of, value.operands)))
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
    given = arguments(example)
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_random_states_kept())
        stack.enter_context(_without_log("torch._subclasses.fake_tensor"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # warnings of a run that nobody asked for are noise
        if not with_values:
            stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        convert = _on_cpu if with_values else _without_values
        recorder = Recorder(skeleton(model, convert), is_leaf)
        try:
            recorder.run(*tree_map_only(Tensor, convert, given))
        except unreadable:
            return Recording(model, recorder, reads_values=True)
        except Exception as error:  # the model's code may raise anything, not only on fake tensors
            if with_values or not holds_values(example):
                raise ValueError(
                    f"could not run this {type(model).__name__} on the example: "
                    f"{one_line(error, 200)}. An example is what the model takes: a tensor, a "
                    "tuple of arguments, or a dict of keyword arguments"
                ) from error
        else:
            return Recording(model, recorder, reads_values=False)
    return record(model, example, is_leaf, with_values=True)


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


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
