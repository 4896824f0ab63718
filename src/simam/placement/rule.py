"""The rule: SimAM follows the last spatial convolutions of every residual block.

Source: the authors' networks (Yang et al., ICML 2021, section 4), stated as a rule. `dataflow.py`
computes the branch of a residual block. A block without a skip, because it changes the shape,
counts if blocks of its class are residual elsewhere in the model. Every candidate block is analysed
alone: a block that cannot be traced costs only itself, and is reported. See README.md in this
folder for a worked example.
"""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ..messages import one_line
from .dataflow import BlockGraph, Branch, holds_spatial_convolution, is_convolution
from .place import NoHostError, find_hosts
from .tracing import traces


@dataclass(frozen=True)
class Insertion:
    """One SimAM in a network.

    Attributes:
        path (str): the path of the host, the module whose output passes through SimAM.
        block (str): the path of the residual block; "" is the model itself.
        host (str): the kind of the host, such as "Conv2d 3x3".
        reason (str): why SimAM goes there.
    """

    path: str
    block: str
    host: str
    reason: str


@dataclass(frozen=True)
class Unanalysed:
    """A block that may be residual but could not be traced, so that it gets no SimAM.

    Attributes:
        block (str): the path of the block; "" is the model itself.
        reason (str): the class of the block, and the error that stopped the trace.
    """

    block: str
    reason: str


def find_insertions(model: nn.Module, place: str) -> tuple[list[Insertion], list[Unanalysed]]:
    """Apply the rule to every block of the model, without running or changing the model."""
    graphs: dict[str, BlockGraph] = {}
    unanalysed: list[Unanalysed] = []
    for path, block in model.named_modules():
        if _may_be_residual(block):
            try:
                graphs[path] = _analyse(block)
            except Exception as error:  # the block's own code, run on symbols, may raise anything
                summary = one_line(error, 100)
                unanalysed.append(Unanalysed(path, f"{type(block).__name__}, {summary}"))

    insertions: dict[str, Insertion] = {}
    # named_modules() lists a module that stands at several paths once, at the first of them.
    paths = {module: path for path, module in model.named_modules()}
    occurrences = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    shared = {module for module, count in occurrences.items() if count > 1}

    def add(block: str, branch: Branch, of_what: str) -> None:
        try:
            hosts = find_hosts(graphs[block], branch, place, shared)
        except NoHostError as error:
            kind = graphs[block].kind.__name__
            unanalysed.append(Unanalysed(block, f"{kind}, no host for place={place!r}: {error}"))
            return
        for path, what in hosts:
            host = model.get_submodule(f"{block}.{path}" if block else path)
            reason = f"{what} of {of_what}"
            insertions[paths[host]] = Insertion(paths[host], block, describe_host(host), reason)

    branches = {path: graph.residual_branches() for path, graph in graphs.items()}
    residual_kinds = {graphs[path].kind for path, found in branches.items() if found}
    for path, graph in graphs.items():
        name = graph.kind.__name__
        for branch in branches[path]:
            add(path, branch, f"the residual branch of {name}")
        if not branches[path] and (graph.kind in residual_kinds or _is_skipless(graph)):
            whole = graph.whole()
            if whole and whole.last:
                add(path, whole, f"{name}, whose skip is off here")

    # A container that cannot be traced costs nothing if its residual blocks were analysed.
    containers = {path[:i] for path in insertions for i, c in enumerate(path) if c == "."}
    unanalysed = [
        u for u in unanalysed if u.block not in containers and (u.block or not insertions)
    ]
    return [insertions[path] for path in paths.values() if path in insertions], unanalysed


def describe_host(host: nn.Module) -> str:
    """The kind of a host, such as "Conv2d 3x3"; with SimAM attached it is the same."""
    kind = getattr(host, "plain_class", type(host))  # the class before attach
    size: Any = getattr(host, "kernel_size", ())
    kernel = "x".join(map(str, size if isinstance(size, Iterable) else (size,)))
    return f"{kind.__name__} {kernel}".rstrip()


def _analyse(block: nn.Module) -> BlockGraph:
    """The graph of the first control-flow path that is residual, or else of the first path."""
    all_traces = traces(block, is_convolution, lambda module: not holds_spatial_convolution(module))
    graphs = []
    for trace in all_traces:
        graphs.append(BlockGraph(block, trace))
        if graphs[-1].residual_branches():
            return graphs[-1]
    return graphs[0]


def _is_skipless(graph: BlockGraph) -> bool:
    """Whether the block belongs to timm's inverted-residual family and has its skip turned off.

    In a network such as MobileNetV1, where no block has a skip, `has_skip` is the only sign. A
    single convolution with a norm (timm's ConvBnAct) belongs to the family only where it adds.
    """
    return getattr(graph.block, "has_skip", None) is False and graph.is_deep()


def _may_be_residual(block: nn.Module) -> bool:
    kind: Any = type(block)  # Any, since mypy takes no class of modules for hashable
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
