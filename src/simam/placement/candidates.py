"""Which modules may be residual blocks, judged by their code before any trace."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from .convolutions import holds_spatial_convolution, is_convolution, plain_class

# Parts of the names of functions whose result has another resolution than their input.
UPSAMPLING = ("interpolate", "upsampl", "pixel_shuffle", "pixelshuffle", "unpool")


def may_be_residual(block: nn.Module) -> bool:
    """Whether a module holds a spatial convolution and contains an addition.

    The addition may stand in its class, in a function that its class calls, or in a child without
    spatial convolutions that takes both operands.
    """
    kind = plain_class(block)
    if kind.__module__.startswith("torch.") or is_convolution(block):
        return False
    return (_adds(kind) or any(map(_is_helper, block.children()))) and holds_spatial_convolution(
        block
    )


def _is_helper(child: nn.Module) -> bool:
    kind = plain_class(child)
    is_of_torch = kind.__module__.startswith("torch.")
    adds = not is_of_torch and _contains_sum(kind.forward, of_inputs=True)
    return adds and not holds_spatial_convolution(child)


@cache
def _adds(kind: type) -> bool:
    """Whether a method of the class other than its constructor, or a function, contains a sum."""
    methods = list(_methods(kind))
    return any(map(_contains_sum, methods)) or any(
        _contains_sum(function, of_inputs=True)
        for method in methods
        for function in _functions_in(method)
    )


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, method in vars(base).items():
                if isinstance(method, FunctionType) and name != "__init__":
                    yield method


def _functions_in(method: FunctionType) -> Iterator[FunctionType]:
    """The functions that a method calls by a global name."""
    for name in method.__code__.co_names:
        function = method.__globals__.get(name)
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            yield function


@cache
def _contains_sum(function: Callable[..., Any], *, of_inputs: bool = False) -> bool:
    """Whether a function adds what may be two maps of the same resolution.

    Args:
        function (callable): the function.
        of_inputs (bool): whether only sums count that join what comes from two parameters without
            a default, or two values of one.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # without source, assume that it adds
        return True
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)

    parameters = inspect.signature(function).parameters.values()
    inputs = {p.name for p in parameters if p.default is p.empty} - {"self"}

    def is_sum_of_maps(one: ast.expr, other: ast.expr) -> bool:
        if of_inputs and inputs.isdisjoint(_names(one, assigned)):
            return False
        values = assigned.get(one.id, []) if isinstance(one, ast.Name) else [one]
        if values and all(map(_is_number, values)):
            return False
        is_upsampled = bool(values) and all(map(_is_upsampled, values))
        return not is_upsampled or not _names(one, {}).isdisjoint(_names(other, assigned))

    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            operands = [node.left, node.right]
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            operands = [node.target, node.value]
        elif _is_named_sum(node) and not of_inputs:
            return True
        else:
            continue
        if is_sum_of_maps(*operands) and is_sum_of_maps(*reversed(operands)):
            return True
    return False


def _is_named_sum(node: ast.AST) -> bool:
    """Whether the builtin `sum` is named, or a function or method `add`."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("add", "add_")
    return isinstance(node, ast.Name) and node.id == "sum"


def _names(value: ast.expr, assigned: dict[str, list[ast.expr]]) -> set[str]:
    """The names in an expression, and in the expressions that were assigned to these."""
    ahead, names = [value], set[str]()
    for each in ahead:
        new = {n.id for n in ast.walk(each) if isinstance(n, ast.Name)} - names
        names |= new
        ahead += [v for name in new for v in assigned.get(name, [])]
    return names


def _is_number(value: ast.expr) -> bool:
    """Whether an expression is a number, a text, or the length or size of something."""
    called = _name_of(value.func) if isinstance(value, ast.Call) else ""
    return isinstance(value, ast.Constant | ast.JoinedStr) or called in ("len", "int", "size")


def _is_upsampled(value: ast.expr) -> bool:
    called = _name_of(value.func) if isinstance(value, ast.Call) else ""
    return any(part in called.lower() for part in UPSAMPLING)


def _name_of(function: ast.expr) -> str:
    named = isinstance(function, ast.Name | ast.Attribute)
    return getattr(function, "id", getattr(function, "attr", "")) if named else ""
