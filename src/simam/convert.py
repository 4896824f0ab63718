"""Replace hand-written SimAM modules that compute the same by `simam.SimAM`."""

import inspect
import warnings
from typing import TypeVar

from torch import Tensor, nn
from torch.jit import ScriptModule

from .hosts import is_host
from .messages import first_few
from .module import SimAM
from .placement import Selector, check_module, select

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, where: Selector | None = None) -> Model:
    """Replace hand-written SimAM modules by `simam.SimAM`, in place, where both compute the same.

    Every candidate is examined as by `identify`. It is replaced if it computes the shared or the
    leave-one-out form, with the lambda that it computes with. Outputs stay equal within rounding;
    what changes is speed, the memory that is kept for backward, maps of one element and float16.
    The new layer is in the mode of the old one and keeps its plain attributes, such as the `f` and
    `i` that Ultralytics reads. The state dict keeps all of its keys.

    Args:
        model (nn.Module): the network.
        where (str, iterable of str, or callable, optional): the candidates: a glob or several over
            the paths of the model's modules (`*` matches dots, too), each of which must match; or a
            predicate `(path, module) -> bool`. By default the modules whose class name contains
            "simam", in any case. Layers that are a `simam.SimAM` already stay.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError: model is not a module, or where is of another type.
        ValueError: there is no candidate, or model is itself the candidate or a TorchScript module.

    Warns:
        UserWarning: candidates that stay, each with the reason: they compute something else, or
            have parameters, buffers or hooks that would be lost.

    Examples:
        >>> import torch
        >>> class MySimAM(nn.Module):
        ...     def forward(self, x):
        ...         d = x - x.mean((2, 3), keepdim=True)
        ...         v = x.var((2, 3), keepdim=True)
        ...         return x * torch.sigmoid(d**2 / (4 * (v + 0.1)) + 0.5)
        >>> convert(nn.Sequential(nn.ReLU(), MySimAM()))
        Sequential(
          (0): ReLU()
          (1): SimAM(e_lambda=0.1, statistics='shared')
        )
    """
    check_module(model)
    if isinstance(model, ScriptModule):
        raise ValueError("a TorchScript module cannot be changed; convert before scripting")
    candidates = _candidates(model, where)
    ranks = _ranks_of_input(model)
    compiled = [getattr(module, "_orig_mod", None) for module in model.modules()]
    replacements: dict[nn.Module, SimAM] = {}
    replaced: list[str] = []
    left: list[str] = []
    for path, module in candidates.items():
        if any(path.startswith(f"{each}.") for each in replaced):
            continue
        layer, reason = _replacement(module, ranks)
        if module in compiled:
            layer, reason = None, "it is compiled; convert before torch.compile"
        if layer is None:
            left.append(f"{path} ({type(module).__name__}): {reason}")
        else:
            replacements[module] = layer
            replaced.append(path)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    if left:
        warnings.warn(
            "left as they are, because simam.SimAM would not do the same: "
            + "; ".join(left)
            + ". simam.identify(module) says more",
            stacklevel=2,
        )
    return model


def _candidates(model: nn.Module, where: Selector | None) -> dict[str, nn.Module]:
    """The modules to examine, each at the first of its paths, the outer ones first."""
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    ours = [module for module in model.modules() if isinstance(module, SimAM)]
    if where is not None:
        paths = select(where, modules, "where", "the model's modules")
        chosen = {path: modules[path] for path in modules if path in paths}
    else:
        if _looks_like_simam(model) and not any(_looks_like_simam(m) for m in modules.values()):
            raise ValueError(
                f"this {type(model).__name__} cannot replace itself; convert the network that "
                "holds it, or write simam.SimAM in its place"
            )
        chosen = {path: m for path, m in modules.items() if _looks_like_simam(m)}
        # A block that holds a SimAM of its own may be called after it.
        chosen = {
            path: m
            for path, m in chosen.items()
            if not any(part in ours or part in chosen.values() for part in list(m.modules())[1:])
        }
        if not chosen and not ours:
            raise ValueError(
                f"found no module whose class name contains 'simam' in this {type(model).__name__};"
                " choose modules with where=, for example where='*.attention'"
            )
    first: dict[nn.Module, str] = {}
    for path, module in chosen.items():
        if not isinstance(module, SimAM) and not is_host(module):
            first.setdefault(module, path)
    return {path: module for module, path in first.items()}


def _looks_like_simam(module: nn.Module) -> bool:
    is_ours = isinstance(module, SimAM) or is_host(module)
    return "simam" in type(module).__name__.lower() and not is_ours


def _ranks_of_input(model: nn.Module) -> set[int]:
    """The numbers of dimensions that maps in a network may have, by its convolutions."""
    kinds = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
    ranks = {rank for m in model.modules() for kind, rank in kinds.items() if isinstance(m, kind)}
    return ranks or {4}


def _replacement(module: nn.Module, ranks: set[int]) -> tuple[SimAM | None, str]:
    """Return the layer that computes the same, or the reason why there is none."""
    # Late, because few programs that import simam need them.
    from .identify.examination import examine
    from .identify.subject import hooks_of

    if isinstance(module, ScriptModule):
        return None, "it is a TorchScript module"
    if hooks_of(module):
        return None, "it has hooks, which would be lost"
    for kind in ("parameters", "buffers"):
        names = [name for name, _ in getattr(module, f"named_{kind}")()]
        if names:
            return None, f"it has {kind} ({first_few(names)}), which would be lost"
    others = list(inspect.signature(module.forward).parameters)[1:]
    if others:
        return None, f"its forward takes further arguments ({first_few(others)})"
    try:
        found = examine(module)
    except ValueError as error:
        return None, str(error)
    if found.formula == "other" or found.e_lambda is None:
        return None, f"it {found.difference}"
    wrong = sorted(ranks & set(found.other_ranks))
    if wrong:
        return None, f"it computes something else on {wrong[0]}-D input"
    layer = SimAM(e_lambda=found.e_lambda, statistics=found.formula).train(module.training)
    for name, value in vars(module).items():
        # Plain attributes that the network's code may read. A tensor would be a result of the past.
        if name not in vars(layer) and name not in vars(SimAM) and not isinstance(value, Tensor):
            setattr(layer, name, value)
    return layer, ""
