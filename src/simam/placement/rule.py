"""Where SimAM goes in a network: after the last spatial convolutions of its residual blocks.

Source: the authors' networks (Yang et al., ICML 2021, section 4), stated as a rule. `flow.py`
finds the branch of a residual block; a block whose skip is off because it changes the shape
counts with the blocks of its kind. Every candidate is analysed alone: one that cannot be traced
costs only itself, and is reported.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .dataflow import Flow, holds_spatial_convolution, is_convolution
from .tracing import traces


class Point(NamedTuple):
    """The path of a convolution that SimAM follows, that of its residual block, and why."""

    path: str
    block: str
    reason: str


class Unanalysed(NamedTuple):
    """The path of a block that may be residual, and what kept it from being traced."""

    block: str
    reason: str


def find_points(model: nn.Module) -> tuple[list[Point], list[Unanalysed]]:
    """Apply the rule to every block of the model, without running or changing it."""
    flows: dict[str, Flow] = {}
    unanalysed: list[Unanalysed] = []
    for path, block in model.named_modules():
        if _may_be_residual(block):
            try:
                flows[path] = _analyse(block)
            except Exception as error:  # the block's own code, run on symbols, may raise anything
                summary = textwrap.shorten(f"{type(error).__name__}: {error}", 100)
                unanalysed.append(Unanalysed(path, f"{type(block).__name__}, {summary}"))

    points: dict[str, Point] = {}
    paths = {module: path for path, module in model.named_modules()}  # of a shared one, the first

    def add(path: str, convolutions: list[str], what: str) -> None:
        parallel = f" (1 of {len(convolutions)} in parallel)" if len(convolutions) > 1 else ""
        for convolution in convolutions:
            full = paths[model.get_submodule(f"{path}.{convolution}" if path else convolution)]
            points[full] = Point(full, path, f"last spatial convolution{parallel} of {what}")

    branches = {path: flow.residual_branches() for path, flow in flows.items()}
    residual_kinds = {flows[path].kind for path, found in branches.items() if found}
    for path, flow in flows.items():
        name = flow.kind.__name__
        for branch in branches[path]:
            add(path, branch, f"the residual branch of {name}")
        if not branches[path] and (flow.kind in residual_kinds or _is_skipless(flow)):
            add(path, flow.last_convolutions(), f"{name}, whose skip is off here")

    # The trouble of a container is not that of the residual blocks that were found in it.
    containers = {path[:i] for path in points for i, c in enumerate(path) if c == "."}
    unanalysed = [u for u in unanalysed if u.block not in containers and (u.block or not points)]
    return [points[path] for path in paths.values() if path in points], unanalysed


def _analyse(block: nn.Module) -> Flow:
    """The first way through the block that is residual, or else the first."""
    ways = traces(block, is_convolution, lambda module: not holds_spatial_convolution(module))
    flows = []
    for trace in ways:
        flows.append(Flow(block, trace))
        if flows[-1].residual_branches():
            return flows[-1]
    return flows[0]


def _is_skipless(flow: Flow) -> bool:
    """Whether the block is of timm's inverted-residual family, its skip off.

    Nothing else tells in a net where none of them adds, as MobileNetV1. A single convolution
    with a norm (timm's ConvBnAct) is of the family only where it adds.
    """
    return getattr(flow.block, "has_skip", None) is False and flow.is_deep()


def _may_be_residual(block: nn.Module) -> bool:
    kind: Any = type(block)  # Any, since mypy takes no class of modules for hashable
    has_own_code = not kind.__module__.startswith("torch.") and not is_convolution(block)
    return has_own_code and _adds(kind) and holds_spatial_convolution(block)


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


def _syntax(method: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # no source to read: it may add
        return ast.parse("a + b")


def _contains_addition(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add))
        or (isinstance(node, ast.Name) and node.id == "sum")
        or (isinstance(node, ast.Attribute) and node.attr in ("add", "add_"))
        for node in ast.walk(tree)
    )
