"""Where SimAM goes in an existing network, and how the answer is shown; nothing is changed here."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.jit import ScriptModule

from ..hosts import is_host
from ..messages import first_few, table
from .convolutions import is_convolution, is_spatial, parts_of_adapters, plain_class
from .example import Example
from .existing import ExistingSimAM, existing_beside, find_layers
from .own_forward import behind_convolution
from .place import PLACES
from .rule import Insertion, Unanalysed, describe_host, find_insertions
from .selection import Selector, match_globs, select

__all__ = [
    "PLACES",
    "Example",
    "ExistingSimAM",
    "Insertion",
    "Plan",
    "Selector",
    "Unanalysed",
    "check_module",
    "find_insertions",
    "list_existing",
    "list_unanalysed",
    "match_globs",
    "plan",
    "select",
]


class Plan(list[Insertion]):
    """What `attach` would do: insertions in the model's order; `print` shows them as a table.

    Attributes:
        unanalysed (tuple[Unanalysed, ...]): blocks that may be residual, but could not be traced or
            have no host. They get no SimAM.
        existing (tuple[ExistingSimAM, ...]): SimAM that `attach` did not insert. A block that has
            one gets no second, unless `where=` selects the host.
    """

    def __init__(
        self,
        insertions: Iterable[Insertion],
        unanalysed: Iterable[Unanalysed] = (),
        existing: Iterable[ExistingSimAM] = (),
    ) -> None:
        super().__init__(insertions)
        self.unanalysed = tuple(unanalysed)
        self.existing = tuple(existing)

    def __str__(self) -> str:
        rows = [("path", "host", "block", "reason")]
        rows += [(i.path, i.host, i.block or "(model)", i.reason) for i in self]
        lines = [table(rows)]
        if self.unanalysed:
            lines += ["", "Not analysed, so without SimAM:"]
            lines += [f"  {u.block or '(model)'}  {u.reason}" for u in self.unanalysed]
            lines += [example_hint(self.unanalysed)] if example_hint(self.unanalysed) else []
        if self.existing:
            selected = {i.path for i in self}.issuperset(e.block for e in self.existing)
            lines += ["", f"With SimAM already{', so without a second' * (not selected)}:"]
            lines += [f"  {e.block or '(model)'}  {e}" for e in self.existing]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    *,
    place: str = "conv",
    where: Selector | None = None,
    exclude: Selector | None = None,
    example: Example | None = None,
) -> Plan:
    """Show where `attach` would put SimAM, without running or changing the model.

    SimAM goes into the branch of every residual block. By default it goes where the authors put it,
    stated as a rule: after the last spatial (kernel > 1) convolution of the branch, before the norm
    that follows.

    Args:
        model (nn.Module): the network; it may be on the meta device.
        place (str): "conv", after that convolution (the authors'); "norm", after the norm that
            follows it; or "branch", at the end of the branch, just before the add, but before
            dropout and stochastic depth.
        where (str, iterable of str, or callable, optional): names the hosts instead. One glob or
            several over the paths of the model's modules (`*` matches dots too), each of which must
            match; or a predicate `(path, module) -> bool`. What selects convolutions selects these
            alone; only what selects no convolution selects other modules.
        exclude (str, iterable of str, or callable, optional): hosts to leave out, in the same form;
            also the path of a block that could not be analysed, or that has SimAM already.
        example (Tensor, tuple, or dict, optional): what the model takes: its input, its arguments,
            or its keyword arguments. The blocks are then analysed by what they do: a copy of the
            model without values runs once on tensors of these shapes and computes nothing. Only if
            the model reads values in Python, such as the number of boxes that it found, a copy
            runs on the example itself, on the CPU. Blocks that do not run are analysed as without
            an example, by their code.

    Returns:
        Plan: a list of `Insertion(path, block, host, reason)`, never empty.

    Raises:
        TypeError: model is not a module, or where, exclude or example is of another type.
        ValueError: the model has no residual block with a spatial convolution, none with a host
            at this place, or SimAM in every such block already; the place is unknown; place or
            example is given beside where; a selection matches nothing; or the model cannot be run
            on the example.

    Source:
        Yang et al., ICML 2021, section 4, and the published networks.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        ...     def forward(self, x):
        ...         return x + self.conv2(self.conv1(x).relu())
        >>> plan(nn.Sequential(Block(), Block()), exclude="1.*")[0].path
        '0.conv2'

        Code that loops over its input needs an example:

        >>> import torch
        >>> class Chunked(Block):
        ...     def forward(self, x):
        ...         parts = [self.conv1(part) for part in x.chunk(2)]
        ...         return x + self.conv2(torch.cat(parts).relu())
        >>> plan(Chunked(), example=torch.empty(2, 8, 9, 9, device="meta"))[0].path
        'conv2'
    """
    check_module(model)
    if isinstance(model, ScriptModule):
        raise ValueError("a TorchScript module cannot be changed; plan and attach before scripting")
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(map(repr, PLACES))}, got {place!r}")
    if where is not None:
        if place != "conv" or example is not None:
            other = f"place={place!r}" if place != "conv" else "example="
            raise ValueError(f"where= names the hosts, so {other} has no meaning beside it")
        planned = _selected(model, where)
    else:
        planned = Plan(*find_insertions(model, place, example))
    if not planned:
        raise ValueError(_nothing_found(model, place, planned))
    if exclude is not None:
        paths = [i.path for i in planned] + [u.block for u in planned.unanalysed]
        paths += [e.block for e in planned.existing]
        left_out = select(
            exclude, {p: model.get_submodule(p) for p in paths}, "exclude", "the planned insertions"
        )
        unanalysed = [u for u in planned.unanalysed if u.block not in left_out]
        existing = [e for e in planned.existing if e.block not in left_out]
        planned = Plan((i for i in planned if i.path not in left_out), unanalysed, existing)
        if not planned:
            raise ValueError(f"exclude={exclude!r} leaves out every insertion; nothing to attach")
    return planned


def check_module(model: object) -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")


def list_unanalysed(unanalysed: Sequence[Unanalysed]) -> str:
    """Name the first blocks that could not be analysed, each with the reason."""
    listed = first_few([f"{u.block or 'the model itself'} ({u.reason})" for u in unanalysed])
    hint = example_hint(unanalysed)
    return f"{listed}. {hint}" if hint else listed


def example_hint(unanalysed: Sequence[Unanalysed]) -> str:
    """Say how to have blocks analysed that cannot be traced; empty if there are none."""
    if not any(u.needs_example for u in unanalysed):
        return ""
    return (
        "Give an example of the model's input to analyse such blocks by what they do: "
        "example=torch.zeros(1, 3, 224, 224). It passes through the model once, without computing "
        "anything"
    )


def list_existing(existing: Sequence[ExistingSimAM]) -> str:
    """Name the first blocks or hosts that have SimAM already, each with how it was recognised."""
    return first_few([f"{e.block or 'the model itself'} ({e})" for e in existing])


def _selected(model: nn.Module, where: Selector) -> Plan:
    """The insertions that where= names."""
    inner = {module.simam for module in model.modules() if is_host(module)}
    inner |= parts_of_adapters(model)
    modules = {path: m for path, m in model.named_modules() if m not in inner}
    convolutions = {path: m for path, m in modules.items() if is_convolution(m)}
    chosen = select(where, modules, "where", "the model's modules", convolutions)
    insertions = []
    for path, module in modules.items():
        if path in chosen:
            reason = "selected by where=" + _behind(module)
            block = path.rpartition(".")[0]
            insertions.append(Insertion(path, block, describe_host(module), reason))
    layers = find_layers(model)
    existing = [each for i in insertions for each in existing_beside(model, i.path, layers)]
    return Plan(insertions, existing=existing)


def _behind(host: nn.Module) -> str:
    """What comes between the convolution of a host and SimAM, for the reason of an insertion."""
    if not is_convolution(host):
        return ""
    behind, kind = behind_convolution(host), plain_class(host).__name__
    if behind.error:
        return f"; behind the whole {kind}"
    return f"; behind {', '.join(behind.names)} of this {kind}" if behind.names else ""


def _where_hint(model: nn.Module) -> str:
    """Suggest a path of the model itself: that of its last spatial convolution."""
    paths = [path for path, module in model.named_modules() if path and is_spatial(module)]
    if not paths:
        return "It has no spatial convolution at all; where= can name other modules as hosts"
    return f"Choose hosts with where=, for example where={paths[-1]!r}"


def _nothing_found(model: nn.Module, place: str, planned: Plan) -> str:
    kind = type(model).__name__
    if planned.existing:
        message = (
            f"this {kind} has SimAM already, and no place is left: "
            f"{list_existing(planned.existing)}. To attach SimAM instead, replace these layers by "
            "nn.Identity() first. To insert a second one all the same, choose hosts with where=."
        )
    else:
        behind = "" if place == "conv" else f", with a host for place={place!r}"
        message = (
            f"found no place for SimAM in this {kind}: no residual block whose branch holds a "
            f"spatial (kernel > 1) convolution and a non-linearity{behind}. "
            f"{_where_hint(model)}."
        )
    unanalysed = planned.unanalysed
    return f"{message} Could not analyse {list_unanalysed(unanalysed)}." if unanalysed else message
