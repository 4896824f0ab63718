"""SimAM that a model has already: layers of this library, and others by their names.

Copies of SimAM are written by hand in many networks, as modules, methods or functions. They are
recognised by the letters "simam" in a name, in upper or lower case.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from ..hosts import is_host
from ..module import SimAM
from .candidates import may_be_residual
from .convolutions import is_convolution, plain_class
from .dataflow import BlockGraph, Branch

_BY = "is taken for SimAM by"


@dataclass(frozen=True)
class ExistingSimAM:
    """A SimAM that `attach` did not insert.

    Attributes:
        block (str): the path of the block that has it; "" is the model itself. With `where=`, the
            path of the host beside it.
        path (str): the path of the layer, or of the module whose code computes SimAM.
        reason (str): how it was recognised: "is a SimAM layer", or by which name.
    """

    block: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'} {self.reason}"


def find_layers(model: nn.Module) -> dict[str, str]:
    """Find SimAM layers that `attach` did not insert: by path, how each was recognised.

    A module that stands at several paths is listed at each.
    """
    attached = {module.simam for module in model.modules() if is_host(module)}
    layers = {}
    for path, module in model.named_modules(remove_duplicate=False):
        reason = "" if module in attached else _recognise(path, module)
        if reason:
            layers[path] = reason
    # A module that holds such a layer is none itself.
    return {path: r for path, r in layers.items() if not any(is_within(o, path) for o in layers)}


def existing_in_branch(
    branch: Branch, path: str, graph: BlockGraph, layers: dict[str, str], blocks: Collection[str]
) -> list[ExistingSimAM]:
    """The SimAM that a branch has already. What an inner block holds is not of the outer branch.

    Args:
        branch (Branch): a branch of the block.
        path (str): the path of the block.
        graph (BlockGraph): the block.
        layers (dict of str to str): the layers that `find_layers` found in the model.
        blocks (collection of str): the paths of all residual blocks of the model.
    """
    last = [join(path, str(node.target)) for node in branch.last]

    def is_apart(layer: str) -> bool:
        inner = (b for b in blocks if is_within(b, path) and is_within(layer, b))
        return any(not any(is_within(host, b) for host in last) for b in inner)

    present = {
        layer: reason
        for layer, reason in layers.items()
        if is_within(layer, path) and not is_apart(layer)
        if graph.touches(branch, layer.removeprefix(f"{path}."))
    }
    for relative, module in graph.modules.items():
        own = join(path, relative)
        if any(host == own or is_within(host, own) for host in last):
            present |= _recognise_code(own, module)
    return [ExistingSimAM(path, *each) for each in present.items()]


def existing_beside(model: nn.Module, host: str, layers: dict[str, str]) -> list[ExistingSimAM]:
    """The SimAM in the block of a host that `where=` selects, or behind it in its Sequential.

    The block is not traced: it is the innermost module that may be residual.
    """
    around = [host[:i] for i, c in enumerate(f"{host}.") if c == "."][::-1]
    around += [""] * bool(host)
    is_block = [may_be_residual(model.get_submodule(path)) for path in around]
    around = around[: is_block.index(True) + 1 if any(is_block) else 0]
    behind = _behind_in_sequential(model, host)
    present = {
        path: reason
        for path, reason in layers.items()
        if any(is_within(path, block) for block in around[-1:])
        or any(path == other or is_within(path, other) for other in behind)
    }
    for path in around:
        present |= _recognise_code(path, model.get_submodule(path))
    return [ExistingSimAM(host, *each) for each in present.items()]


def is_within(path: str, module: str) -> bool:
    """Whether a path leads to a module inside another."""
    return path != module and path.startswith(f"{module}." if module else "")


def join(path: str, relative: str) -> str:
    """The path of a module inside another; "" is the model itself."""
    return f"{path}.{relative}" if path and relative else path or relative


def _behind_in_sequential(model: nn.Module, host: str) -> list[str]:
    """The paths of the modules behind a host in its Sequential, up to the next convolution."""
    parent, _, name = host.rpartition(".")
    container = model.get_submodule(parent)
    if not (host and isinstance(container, nn.Sequential)):
        return []
    names = list(container._modules)
    behind = takewhile(
        lambda n: not _holds_convolution(container.get_submodule(n)),
        names[names.index(name) + 1 :],
    )
    return [join(parent, n) for n in behind]


def _recognise(path: str, module: nn.Module) -> str:
    """How a layer shows that it is SimAM; "" if it is another layer, or holds convolutions."""
    if isinstance(module, SimAM):
        return "is a SimAM layer"
    if isinstance(module, nn.Identity) or _holds_convolution(module):
        return ""
    by_code = _recognise_code(path, module).get(path, "")
    return f"{_BY} its name" if _is_simam(path.rpartition(".")[2]) else by_code


def _recognise_code(path: str, module: nn.Module) -> dict[str, str]:
    """How the code of a module shows that it computes SimAM, by its path; empty if it does not.

    Neither the name of the model's class counts, nor names of submodules, flags and numbers.
    """
    kind = plain_class(module)
    if _is_simam(kind.__name__) and path:
        return {path: f"{_BY} the name of its class, {kind.__name__}"}
    for name, value in _names(kind):
        found = getattr(module, name, value)
        if isinstance(found, ModuleType) or (callable(found) and not isinstance(found, nn.Module)):
            return {path: f"{_BY} the name {name} in its code"}
    return {}


def _holds_convolution(module: nn.Module) -> bool:
    return any(map(is_convolution, module.modules()))


def _is_simam(name: str) -> bool:
    return "simam" in name.lower()


@cache
def _names(kind: type) -> tuple[tuple[str, Any], ...]:
    """The names for SimAM in the methods of a class, with their values where these are known."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")):
            continue
        for name, method in vars(base).items():
            if isinstance(method, FunctionType) and name != "__init__":
                used = filter(_is_simam, (name, *_names_in_code(method.__code__)))
                # An attribute of another object may be a function, such as `functional.simam`.
                found |= {n: method.__globals__.get(n, method) for n in used}
    return tuple(found.items())


def _names_in_code(code: CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in_code(constant)
