"""Whether the code of a function adds two maps, as far as that can be read without running it.

A sum of numbers is none: an index in a loop, for example, or a size. Nor is a sum with an upsampled
map, which joins two resolutions.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

# Parts of the names of functions and modules that return another resolution than they take.
UPSAMPLING = ("interpolate", "upsampl", "pixel_shuffle", "pixelshuffle", "unpool")


@cache
def contains_sum(function: Callable[..., Any], *, of_inputs: bool = False) -> bool:
    """Whether a function adds what may be two maps of the same resolution.

    Args:
        function (callable): the function.
        of_inputs (bool): whether only sums count that join what comes from parameters without a
            default.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parameters = inspect.signature(function).parameters.values()
    except (OSError, SyntaxError, TypeError):  # without source, assume that it adds
        return True
    code = _Code(tree)
    inputs = {p.name for p in parameters if p.default is p.empty} - {"self"} if of_inputs else None
    for node in ast.walk(tree):
        if _is_named_sum(node) and not of_inputs:
            return True
        operands = _operands(node)
        if operands and code.adds_maps(*operands, inputs):
            return True
    return False


class _Code:
    """The code of a function, read without running it.

    Attributes:
        values (dict of str to list of ast.expr): for each name the values that it gets: by
            assignment, by addition, or in a loop.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AugAssign):
                targets, value = [node.target], node.value
            elif isinstance(node, ast.For):
                targets, value = [node.target], node.iter
            else:
                continue
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        self.values.setdefault(name.id, []).append(value)

    def adds_maps(self, first: ast.expr, second: ast.expr, inputs: set[str] | None) -> bool:
        """Whether two summands may be maps of the same resolution, each from one of the inputs."""
        if inputs is not None and any(
            inputs.isdisjoint(self._names(summand)) for summand in (first, second)
        ):
            return False
        if self._is_number(first) or self._is_number(second):
            return False
        return not (self._joins_upsampled(first, second) or self._joins_upsampled(second, first))

    def _joins_upsampled(self, one: ast.expr, other: ast.expr) -> bool:
        """Whether one summand is an upsampled value, from which the other does not come."""
        values = self.values.get(one.id, []) if isinstance(one, ast.Name) else [one]
        is_upsampled = bool(values) and all(map(_is_upsampling, values))
        names = {n.id for n in ast.walk(one) if isinstance(n, ast.Name)}
        return is_upsampled and names.isdisjoint(self._names(other))

    def _names(self, value: ast.expr) -> set[str]:
        """The names in an expression, and in the values of these."""
        ahead, names = [value], set[str]()
        for each in ahead:
            new = {n.id for n in ast.walk(each) if isinstance(n, ast.Name)} - names
            names |= new
            ahead += [v for name in new for v in self.values.get(name, [])]
        return names

    def _is_number(self, value: ast.expr, known: frozenset[str] = frozenset()) -> bool:
        """Whether an expression is a number or a text, for example a size or an index.

        Args:
            value (ast.expr): the expression.
            known (frozenset of str): names that are numbers if all else is.
        """
        match value:
            case ast.Constant() | ast.JoinedStr():
                return True
            case ast.Name(name):
                values = self.values.get(name, [])
                numbers = (self._is_number(v, known | {name}) for v in values)
                return name in known or (bool(values) and all(numbers))
            case ast.BinOp(left, _, right):
                return self._is_number(left, known) and self._is_number(right, known)
            case ast.Tuple(items):
                return all(self._is_number(item, known) for item in items)
            case ast.Subscript(of):
                return self._is_number(of, known)
            case ast.Attribute(_, name):
                return name in ("shape", "ndim")
            case ast.Call(function):
                return _name_of(function) in ("len", "int", "size", "range")
        return False


def _operands(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """The summands of an addition."""
    match node:
        case ast.BinOp(left, ast.Add(), right) | ast.AugAssign(left, ast.Add(), right):
            return left, right
        case ast.Call(ast.Attribute(_, "add"), [left, right]):
            return left, right
        case ast.Call(ast.Attribute(left, "add" | "add_"), [right]):
            return left, right
    return None


def _is_named_sum(node: ast.AST) -> bool:
    """Whether the builtin `sum` is named, or a function or method `add`."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("add", "add_")
    return isinstance(node, ast.Name) and node.id == "sum"


def _is_upsampling(value: ast.expr) -> bool:
    called = _name_of(value.func) if isinstance(value, ast.Call) else ""
    return any(part in called.lower() for part in UPSAMPLING)


def _name_of(function: ast.expr) -> str:
    named = isinstance(function, ast.Name | ast.Attribute)
    return getattr(function, "id", getattr(function, "attr", "")) if named else ""
