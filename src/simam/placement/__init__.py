"""Decide where SimAM goes in an existing network, and show it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.jit import ScriptModule

from .dataflow import is_convolution
from .rule import Unanalysed, find_points

Selector: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Insertion:
    """One SimAM: the path of the convolution it follows, that of the block, and why there."""

    path: str
    block: str
    host: str
    reason: str


class Plan(list[Insertion]):
    """What `attach` would do: insertions in the model's order; `print` shows them as a table.

    Attributes:
        unanalysed (tuple[Unanalysed, ...]): blocks that may be residual but could not be
            traced, so that they get no SimAM, each with the reason.
    """

    def __init__(
        self, insertions: Iterable[Insertion], unanalysed: Iterable[Unanalysed] = ()
    ) -> None:
        super().__init__(insertions)
        self.unanalysed = tuple(unanalysed)

    def __str__(self) -> str:
        rows = [("convolution", "", "block", "reason")]
        rows += [(i.path, i.host, i.block or "(model)", i.reason) for i in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.unanalysed:
            lines += ["", "Not analysed, so without SimAM:"]
            lines += [f"  {u.block or '(model)'}  {u.reason}" for u in self.unanalysed]
        return "\n".join(lines)


def plan(
    model: nn.Module, *, where: Selector | None = None, exclude: Selector | None = None
) -> Plan:
    """Show where `attach` would put SimAM, without touching or running the model.

    SimAM goes where the authors put it, stated as a rule: after the last spatial (kernel > 1)
    convolution of the residual branch of every residual block, before the norm that follows.

    Args:
        model (nn.Module): the network; it may be on the meta device.
        where (str, iterable of str, or callable, optional): takes the place of the analysis.
            Globs over the paths of the model's convolutions (`*` matches dots too), of which
            each must match; or a predicate `(path, module) -> bool` over the convolutions.
        exclude (str, iterable of str, or callable, optional): in the same form, convolutions
            to leave out; also the path of a block that could not be analysed.

    Returns:
        Plan: a list of `Insertion(path, block, host, reason)`, never empty.

    Raises:
        TypeError: model is not a module, or where or exclude has another form.
        ValueError: the model has no residual block with a spatial convolution, or a selection
            matches nothing.

    Source:
        Yang et al., ICML 2021, section 4, and the published networks.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        ...     def forward(self, x):
        ...         return x + self.conv2(self.conv1(x).relu())
        >>> plan(nn.Sequential(Block(), Block()), exclude="1.*")[0].path
        '0.conv2'
    """
    check_module(model)
    if isinstance(model, ScriptModule):
        raise ValueError("a TorchScript module cannot be changed; plan and attach before scripting")
    if where is not None:
        convolutions = {n: m for n, m in model.named_modules() if is_convolution(m)}
        chosen = _select(where, convolutions, "where", "the model's convolutions")
        found = Plan(
            Insertion(path, path.rpartition(".")[0], _describe(module), "selected by where=")
            for path, module in convolutions.items()
            if path in chosen
        )
    else:
        points, unanalysed = find_points(model)
        found = Plan(
            (
                Insertion(path, block, _describe(model.get_submodule(path)), reason)
                for path, block, reason in points
            ),
            unanalysed,
        )
    if not found:
        raise ValueError(_nothing_found(model, found.unanalysed))
    if exclude is not None:
        paths = [i.path for i in found] + [u.block for u in found.unanalysed]
        left_out = _select(
            exclude, {p: model.get_submodule(p) for p in paths}, "exclude", "the planned places"
        )
        unanalysed = [u for u in found.unanalysed if u.block not in left_out]
        found = Plan((i for i in found if i.path not in left_out), unanalysed)
        if not found:
            raise ValueError(f"exclude={exclude!r} leaves out every place; nothing to attach")
    return found


def check_module(model: object) -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")


def name_some(unanalysed: Sequence[Unanalysed]) -> str:
    """The first blocks that could not be analysed, each with the reason, and how many more."""
    named = [f"{u.block or 'the model itself'} ({u.reason})" for u in unanalysed[:3]]
    more = [f"{len(unanalysed) - 3} more"] if len(unanalysed) > 3 else []
    return ", ".join(named + more)


def _select(
    selector: Selector, modules: dict[str, nn.Module], argument: str, of_what: str
) -> set[str]:
    """The paths that a selector picks; an error if it, or a glob of it, picks none."""
    form = f"{argument} must be a glob, several globs, or a predicate (path, module) -> bool"
    if isinstance(selector, nn.Module) or not (
        callable(selector) or isinstance(selector, Iterable)
    ):
        raise TypeError(f"{form}, got {selector!r}")
    chosen = set()
    if callable(selector):
        chosen = {path for path, module in modules.items() if selector(path, module)}
    else:
        globs = [selector] if isinstance(selector, str) else list(selector)
        if not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"{form}, got {selector!r}")
        for glob in globs:
            matches = {path for path in modules if fnmatchcase(path, glob)}
            if not matches:
                raise ValueError(_unmatched(f"{argument}={glob!r}", glob, modules, of_what))
            chosen |= matches
    if not chosen:
        raise ValueError(f"{argument}={selector!r} selects none of {of_what}")
    return chosen


def _unmatched(asked: str, glob: str, modules: Iterable[str], of_what: str) -> str:
    close = get_close_matches(glob, modules, n=3, cutoff=0.4)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    return f"{asked} matches none of {of_what}{hint}"


def _nothing_found(model: nn.Module, unanalysed: Sequence[Unanalysed]) -> str:
    message = (
        f"found no place for SimAM in this {type(model).__name__}: no residual block whose branch "
        "holds a spatial (kernel > 1) convolution and a non-linearity. "
        "Choose convolutions with where=, for example where='features.*'."
    )
    return f"{message} Could not analyse {name_some(unanalysed)}." if unanalysed else message


def _describe(convolution: nn.Module) -> str:
    kind = getattr(convolution, "plain_class", type(convolution))  # as it was before attach
    size: Any = convolution.kernel_size
    kernel = "x".join(map(str, size if isinstance(size, Iterable) else (size,)))
    return f"{kind.__name__} {kernel}"
