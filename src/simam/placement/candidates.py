"""Which modules may be residual blocks, judged by their code before any trace."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from .convolutions import holds_spatial_convolution, is_convolution, plain_class


def may_be_residual(block: nn.Module) -> bool:
    """Whether the class of a module contains an addition, and the module a spatial convolution."""
    kind = plain_class(block)
    has_own_code = not kind.__module__.startswith("torch.") and not is_convolution(block)
    return has_own_code and _adds(kind) and holds_spatial_convolution(block)


@cache
def _adds(kind: type) -> bool:
    """Whether a method of the class other than its constructor contains an addition."""
    return any(
        _contains_addition(_syntax(method))
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for name, method in vars(base).items()
        if inspect.isfunction(method) and name != "__init__"
    )


def _syntax(method: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # without source, assume that it adds
        return ast.parse("a + b")


def _contains_addition(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add))
        or (isinstance(node, ast.Name) and node.id == "sum")
        or (isinstance(node, ast.Attribute) and node.attr in ("add", "add_"))
        for node in ast.walk(tree)
    )
