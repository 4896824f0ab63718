"""Insert SimAM into an existing network, and take it out again.

A convolution gets a child `simam` and a subclass of its own class whose forward passes the
output through that child, as torch's parametrizations do. No parameter or buffer is renamed;
`print`, `modules`, copying, pickling, compiling and exporting see the layer as they see any.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from .blocks import Unanalysed, find_points, is_convolution
from .module import SimAM

Model = TypeVar("Model", bound=nn.Module)
Selector: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Insertion:
    """One SimAM: the path of the convolution it follows, that of the block, and why there."""

    path: str
    block: str
    conv: str
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
        rows += [(i.path, i.conv, i.block or "(model)", i.reason) for i in self]
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
        Plan: a list of `Insertion(path, block, conv, reason)`, never empty.

    Raises:
        TypeError: model is not a module, or where or exclude has another form.
        ValueError: the model has no residual block with a spatial convolution, or a selection
            matches nothing.

    Source:
        Yang et al., ICML 2021, section 4, and the published networks.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        ...     def forward(self, x):
        ...         return x + self.conv2(self.conv1(x).relu())
        >>> plan(nn.Sequential(Block(), Block()), exclude="1.*")[0].path
        '0.conv2'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
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


def attach(
    model: Model,
    *,
    e_lambda: float = 1e-4,
    statistics: str = "shared",
    where: Selector | None = None,
    exclude: Selector | None = None,
) -> Model:
    """Insert SimAM into a network, in place, without renaming a parameter or a buffer.

    State dicts of the plain network load before and after. A pretrained network is not accurate
    right after: its batch norms now see inputs scaled by 0.62 to 1. Fine-tune it, or re-estimate
    its batch-norm statistics, before it is used or judged.

    Convolutions that already have a SimAM get one with the new options; others keep theirs.
    Fold re-parameterisable blocks (`fuse`, timm's `reparameterize_model`) before attaching:
    afterwards the folding would drop the layers.

    Args:
        model (nn.Module): the network.
        e_lambda (float): the regulariser lambda; see `simam.functional.simam`. The authors use
            0.1 on ImageNet and COCO.
        statistics (str): "shared" or "leave_one_out".
        where, exclude: see `plan`.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError, ValueError: as `SimAM` and `plan`, and if a convolution is parametrized, lazy,
            scripted, or has an attribute `simam` of its own. The model is then as it was.

    Warns:
        UserWarning: a block that may be residual could not be analysed and gets no SimAM.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> attach(net, where="0", e_lambda=0.1)
        Sequential(
          (0): SimAMConv2d(
            3, 8, kernel_size=(3, 3), stride=(1, 1)
            (simam): SimAM(e_lambda=0.1, statistics='shared')
          )
          (1): ReLU()
        )
    """
    SimAM(e_lambda=e_lambda, statistics=statistics)  # refuses what is wrong before any change
    planned = plan(model, where=where, exclude=exclude)
    convolutions = [model.get_submodule(insertion.path) for insertion in planned]
    for insertion, convolution in zip(planned, convolutions, strict=True):
        _check_attachable(insertion.path, convolution)
    if planned.unanalysed:
        blocks = "; ".join(f"{u.block or '(model)'}: {u.reason}" for u in planned.unanalysed)
        warnings.warn(
            f"could not analyse, so left without SimAM: {blocks}. "
            "Choose convolutions with where=, or name the blocks in exclude= to accept this.",
            stacklevel=2,
        )
    for convolution in convolutions:
        convolution.simam = SimAM(e_lambda=e_lambda, statistics=statistics).train(
            convolution.training
        )
        if not isinstance(convolution, _WithSimAM):
            convolution.__class__ = _with_simam(type(convolution))
    return model


def detach(model: Model) -> Model:
    """Undo `attach`, in place: every convolution gets back its class and loses its SimAM.

    A model without attached SimAM is returned as it is.

    Args:
        model (nn.Module): the network.

    Returns:
        nn.Module: the model that was given.

    Raises:
        ValueError: a convolution with SimAM has changed its class since, as parametrizations
            do. The model is then as it was.

    Example:
        >>> detach(attach(nn.Sequential(nn.Conv2d(3, 8, 3)), where="0"))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    attached = {p: m for p, m in model.named_modules() if isinstance(m, _WithSimAM)}
    for path, convolution in attached.items():
        if type(convolution) is not _with_simam(convolution.plain_class):
            raise ValueError(
                f"{path} has become a {type(convolution).__name__} since SimAM was attached; "
                "undo that first, for example with torch.nn.utils.parametrize"
            )
    for convolution in attached.values():
        del convolution.simam
        convolution.__class__ = convolution.plain_class
    return model


class _WithSimAM(nn.Module):
    """A convolution whose output passes through its child `simam`."""

    plain_class: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        # Folding a batch norm into the convolution would move it before the SimAM. It shows in
        # the bias, which a convolution before a batch norm does without.
        if name == "bias" and value is not None and self.bias is None:
            raise RuntimeError(
                "cannot give this convolution a bias, as folding a batch norm into it does: "
                "SimAM comes between the two. Fold before simam.attach, or simam.detach first"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by its name; that of the plain convolution can.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.plain_class,), *state


def _new(plain_class: type[nn.Module]) -> nn.Module:
    kind = _with_simam(plain_class)
    return kind.__new__(kind)


@cache
def _with_simam(plain_class: type[nn.Module]) -> type[nn.Module]:
    plain_forward = plain_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.simam(plain_forward(self, *args, **kwargs))

    scriptable = plain_forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    members = {
        "__doc__": f"{plain_class.__name__}, its output passed through the child `simam`.",
        # That of the convolution, so that torch.fx does not look inside either of them.
        "__module__": plain_class.__module__,
        "plain_class": plain_class,
        "forward": _scriptable_forward if scriptable else forward,
    }
    return type(f"SimAM{plain_class.__name__}", (_WithSimAM, plain_class), members)


def _scriptable_forward(self: Any, input: Tensor) -> Tensor:
    # TorchScript knows neither super() nor variable arguments.
    return self.simam(self._conv_forward(input, self.weight, self.bias))


def _check_attachable(path: str, convolution: nn.Module) -> None:
    kind = type(convolution)
    if parametrize.is_parametrized(convolution):
        problem = "is parametrized; attach before torch.nn.utils.parametrize, or remove it first"
    elif isinstance(convolution, ScriptModule):
        problem = "is a TorchScript module; attach before scripting"
    elif any(isinstance(p, UninitializedTensorMixin) for p in convolution.parameters()):
        problem = "is lazy and not yet initialised; run the model once before"
    elif hasattr(convolution, "simam") and not isinstance(convolution, _WithSimAM):
        problem = "already has an attribute 'simam' of its own; rename it"
    else:
        return
    raise ValueError(f"cannot attach SimAM to {path}: this {kind.__name__} {problem}")


def _select(
    selector: Selector, modules: dict[str, nn.Module], argument: str, of_what: str
) -> set[str]:
    """The paths that a selector picks; an error if it, or a glob of it, picks none."""
    if callable(selector):
        chosen = {path for path, module in modules.items() if selector(path, module)}
        if not chosen:
            raise ValueError(f"{argument}={selector!r} selects none of {of_what}")
        return chosen
    globs = [selector] if isinstance(selector, str) else list(selector)
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"{argument} must be a glob, several globs, or a predicate (path, module) -> bool, "
            f"got {selector!r}"
        )
    chosen = set()
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
    lines = [
        f"found no place for SimAM in this {type(model).__name__}: no residual block whose branch "
        "holds a spatial (kernel > 1) convolution and a non-linearity. "
        "Choose convolutions with where=, for example where='features.*'."
    ]
    lines += [f"Could not analyse {u.block or 'the model itself'}: {u.reason}" for u in unanalysed]
    return "\n".join(lines)


def _describe(convolution: nn.Module) -> str:
    kind = type(convolution)
    name = (convolution.plain_class if isinstance(convolution, _WithSimAM) else kind).__name__
    size: Any = convolution.kernel_size
    kernel = "x".join(map(str, size if isinstance(size, Iterable) else (size,)))
    return f"{name} {kernel}"
