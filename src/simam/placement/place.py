"""The hosts of a residual branch for each place in the branch.

The host is the outermost module of the block that returns exactly the value in question and that
runs once. A `Sequential` is no host, since it would run a child `simam` as one of its layers.
"""

from typing import Any, NamedTuple

from torch import fx, nn

from .convolutions import is_convolution, plain_class
from .dataflow import BlockGraph, Branch
from .own_forward import behind_convolution

PLACES = ("conv", "norm", "branch")

# Substrings of names, in lower case: operations that only scale whole samples or pass a value on;
# operations after which dimension 1 need not hold the channels.
_TRANSPARENT = ("drop", "stochastic_depth", "stochasticdepth", "identity")
_REORDERING = (
    "flatten", "linear", "movedim", "permute", "reshape", "swapaxes", "transpose", "view",
)  # fmt: skip


class Host(NamedTuple):
    """A host within a block.

    Attributes:
        path (str): relative to the block.
        what (str): what of the block it is, for the reason of an insertion.
    """

    path: str
    what: str


class NoHostError(ValueError):
    """A block has no module that returns the value at the place; the message says why."""


def find_hosts(graph: BlockGraph, branch: Branch, place: str, shared: set[nn.Module]) -> list[Host]:
    """Find the hosts of a branch.

    Args:
        graph (BlockGraph): the block.
        branch (Branch): one of its branches.
        place (str): "conv", "norm" or "branch".
        shared (set of nn.Module): modules that stand at several paths of the model.

    Raises:
        NoHostError: the block has no host at this place.
    """
    if place == "branch":
        return [Host(_end_of_branch(graph, branch.end, shared), "end")]
    if place == "norm":
        return list(dict.fromkeys(_host_of_norm(graph, node, shared) for node in branch.last))
    for convolution in branch.last:
        _check_nothing_behind(graph, convolution)
    parallel = f" (1 of {len(branch.last)} in parallel)" if len(branch.last) > 1 else ""
    what = f"last spatial convolution{parallel}"
    return [Host(str(convolution.target), what) for convolution in branch.last]


def _check_nothing_behind(graph: BlockGraph, convolution: fx.Node) -> None:
    """Refuse a convolution that computes a norm or an activation, too: SimAM would follow these."""
    module = graph.modules[str(convolution.target)]
    behind = str(behind_convolution(module))
    if behind:
        kind = plain_class(module).__name__
        raise NoHostError(
            f"the forward of {convolution.target} ({kind}) {behind}; name {convolution.target} in "
            "where= to put SimAM behind all of it"
        )


def _end_of_branch(graph: BlockGraph, end: fx.Node, shared: set[nn.Module]) -> str:
    """The host at the end of a branch, before dropout and stochastic depth."""
    equal = [end]
    while _is_any_of(_TRANSPARENT, graph.name(equal[-1])):
        before = graph.operands(equal[-1])[0]
        equal = [*equal, before] if "identity" in graph.name(equal[-1]) else [before]
    _check_single_use(graph, end, equal[-1])
    host = _host_of(graph, equal, shared)
    _check_layout(graph, equal[-1])
    return host


def _norm_behind(graph: BlockGraph, convolution: fx.Node) -> str:
    """The path of the norm that follows a convolution, directly or behind a concatenation."""
    value = convolution
    while True:
        users = graph.users(value)
        for path in graph.trace.callers[users[0]]:
            runs_all_users = all(path in graph.trace.callers[user] for user in users)
            if runs_all_users and _is_norm(graph.modules[path]):
                return path
        if len(users) != 1:
            raise NoHostError(f"{convolution.target} is followed by {len(users)} operations")
        name = graph.name(users[0])
        if "norm" in name:
            raise NoHostError(f"{convolution.target} is followed by a functional norm, no module")
        if name not in ("cat", "concat") and not _is_any_of(_TRANSPARENT, name):
            what = name or "the end of the block"
            raise NoHostError(f"{convolution.target} is not followed by a norm, but by {what}")
        value = users[0]


def _is_norm(module: nn.Module) -> bool:
    holds_convolution = any(map(is_convolution, module.modules()))
    return "norm" in plain_class(module).__name__.lower() and not holds_convolution


def _host_of_norm(graph: BlockGraph, convolution: fx.Node, shared: set[nn.Module]) -> Host:
    module = graph.modules[str(convolution.target)]
    inside = behind_convolution(module).names
    if any("norm" in name.lower() for name in inside):
        has_more = len(inside) > 1
        what = f"norm{' with its activation' * has_more} inside the last spatial convolution"
        return Host(str(convolution.target), what)
    path = _norm_behind(graph, convolution)
    value, *others = graph.trace.outputs[path]
    if others:
        raise NoHostError(f"the norm {path} runs more than once")
    act = getattr(graph.modules[path], "act", None)
    with_act = act is not None and not isinstance(act, nn.Identity)
    what = f"norm{' with its activation' * with_act} behind the last spatial convolution"
    return Host(_host_of(graph, [value], shared), what)


def _host_of(graph: BlockGraph, equal: list[Any], shared: set[nn.Module]) -> str:
    """The path of the outermost module that computes a value itself and returns it.

    Args:
        graph (BlockGraph): the block.
        equal (list of fx.Node): the nodes with this value, the last one computes it.
        shared (set of nn.Module): modules that stand at several paths of the model.
    """
    value = equal[-1]
    outputs = graph.trace.outputs
    found = [p for p in graph.trace.callers[value] if not {*outputs[p]}.isdisjoint(equal)]
    for path in found:
        module = graph.modules[path]
        runs_once = len(outputs[path]) == 1 and module not in shared
        if runs_once and not isinstance(module, nn.Sequential):
            return path
    name = graph.name(value)
    if found:
        raise NoHostError(f"it ends in a {name} that the model uses more than once")
    parameters = _parameters_of(graph, value)
    with_what = f" with {parameters[0]}" if parameters else ""
    raise NoHostError(
        f"it ends in the function {name}{with_what}, and no module returns that value"
    )


def _parameters_of(graph: BlockGraph, value: fx.Node) -> list[str]:
    """The parameters and buffers that an operation takes, as they are or reshaped."""
    constants = [value]
    for node in constants:
        constants += [i for i in node.all_input_nodes if i not in graph.operands(node)]
    return [str(node.target) for node in constants if node.op == "get_attr"]


def _check_single_use(graph: BlockGraph, end: fx.Node, value: fx.Node) -> None:
    while len(graph.users(end)) == 1:
        if end is value:
            return
        end = graph.operands(end)[0]
    raise NoHostError("the end of the branch has other uses than the add")


def _check_layout(graph: BlockGraph, end: fx.Node) -> None:
    """Refuse a branch that may end with the channels in another dimension than 1."""
    ahead = [end]
    for node in ahead:
        if node.op == "call_module" and is_convolution(graph.modules[str(node.target)]):
            continue
        is_in_a_norm = any(_is_norm(graph.modules[path]) for path in graph.trace.callers[node])
        if not is_in_a_norm and _is_any_of(_REORDERING, graph.name(node)):
            raise NoHostError(f"{graph.name(node)} reorders dimensions at the end of the branch")
        gates = graph.gates(node)
        ahead += [i for i in graph.operands(node) if i not in gates and i not in ahead]


def _is_any_of(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)
