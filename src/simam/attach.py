"""Insert SimAM into an existing network, and take it out again.

A host gets a child `simam` and a subclass of its own class whose forward passes the output through
that child, as torch's parametrizations do. No parameter or buffer is renamed; `print`, `modules`,
copying, pickling, compiling and exporting treat the host like any other layer.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import hosts
from .messages import first_few
from .module import SimAM
from .placement import (
    PLACES,
    Example,
    Selector,
    check_module,
    find_insertions,
    list_existing,
    list_unanalysed,
    plan,
)

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    *,
    e_lambda: float = 1e-4,
    statistics: str = "shared",
    place: str = "conv",
    where: Selector | None = None,
    exclude: Selector | None = None,
    example: Example | None = None,
) -> Model:
    """Insert SimAM into a network, in place, without renaming a parameter or a buffer.

    State dicts of the plain network load before and after. A pretrained network loses its accuracy
    at first: its batch norms now see inputs scaled by 0.62 to 1. Fine-tune it. Without
    fine-tuning, `recalibrate` restores most of the accuracy; the fewer stages get SimAM, the more.

    A host that already has a SimAM gets a new one with the new options. Hosts outside the selection
    keep theirs. Fold re-parameterisable blocks (`fuse`, timm's
    `reparameterize_model`) before attaching: folding afterwards drops the SimAM layers.

    Args:
        model (nn.Module): the network.
        e_lambda (float): the regulariser lambda; see `simam.functional.simam`. The authors use
            0.1 on ImageNet and COCO.
        statistics (str): "shared" or "leave_one_out".
        place (str): where in the residual branch: "conv" (the authors'), "norm" or "branch"; see
            `plan`.
        where (str, iterable of str, or callable, optional): see `plan`.
        exclude (str, iterable of str, or callable, optional): see `plan`.
        example (Tensor, tuple, or dict, optional): see `plan`.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError, ValueError: as `SimAM` and `plan`; also if a host cannot be changed (it is
            parametrized, lazy, scripted or a container, or has an attribute `simam` of its own),
            or if SimAM is attached at another place already. The model is then unchanged.

    Warns:
        UserWarning: a block that may be residual could not be analysed and gets no SimAM; a block
            has SimAM already and gets no second one; or it gets one, because where= selects it.

    Examples:
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
    SimAM(e_lambda=e_lambda, statistics=statistics)  # refuses wrong options before any change
    planned = plan(model, place=place, where=where, exclude=exclude, example=example)
    chosen = {insertion.path: model.get_submodule(insertion.path) for insertion in planned}
    for path, host in chosen.items():
        _check_attachable(path, host)
    if where is None:
        _check_other_places(model, place, example)
    if planned.unanalysed:
        warnings.warn(
            "left without SimAM, because they could not be analysed: "
            f"{list_unanalysed(planned.unanalysed)}. Choose hosts with where=, or name the blocks "
            "in exclude= to accept this.",
            stacklevel=2,
        )
    if planned.existing:
        existing = list_existing(planned.existing)
        warnings.warn(
            f"selected by where=, though SimAM is there already: {existing}"
            if where is not None
            else f"left without a second SimAM: {existing}. Choose hosts with where= to insert one "
            "all the same, or name the blocks in exclude= to accept this.",
            stacklevel=2,
        )
    for host in chosen.values():
        layer = SimAM(e_lambda=e_lambda, statistics=statistics)
        hosts.insert(host, layer.train(host.training))
    for module in model.modules():
        hosts.hide_norm(module)
        hosts.fold_once(module)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`, in place: every host gets its class back and loses its SimAM.

    A model without attached SimAM is returned unchanged.

    Args:
        model (nn.Module): the network.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError: model is not a module.
        ValueError: the class of a host has changed since, as parametrizations
            do. The model is then unchanged.

    Examples:
        >>> detach(attach(nn.Sequential(nn.Conv2d(3, 8, 3)), where="0"))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    check_module(model)
    changed = {path: m for path, m in model.named_modules() if hosts.is_changed(m)}
    for path, module in changed.items():
        if hosts.class_was_changed_since(module):
            raise ValueError(
                f"{path} has become a {type(module).__name__} since SimAM was attached; "
                "undo that first, for example with torch.nn.utils.parametrize"
            )
    for module in changed.values():
        hosts.undo(module)
    return model


def attached(model: nn.Module) -> dict[str, SimAM]:
    """Return the SimAM layers that `attach` inserted, so that their presence can be asserted.

    Code that builds a network again from a description, as Ultralytics' `train` and
    `from_pretrained` of Hugging Face do, returns a network without them.

    Args:
        model (nn.Module): the network.

    Returns:
        dict of str to SimAM: the layers by the paths of their hosts; empty if there are none.

    Raises:
        TypeError: model is not a module.

    Examples:
        >>> net = attach(nn.Sequential(nn.Conv2d(3, 8, 3)), where="0")
        >>> attached(net)
        {'0': SimAM(e_lambda=0.0001, statistics='shared')}
    """
    check_module(model)
    return {path: m.simam for path, m in model.named_modules() if hosts.is_host(m)}


@contextmanager
def detached(model: Model) -> Iterator[Model]:
    """Remove the SimAM layers that `attach` inserted for the duration of a `with` block.

    For tools that go by the exact class of a layer, such as thop and torchinfo. The layers return
    when the block ends, with an error too, to the modules that were their hosts. Do not fold norms
    in the block, but in a copy that is detached for good.

    Args:
        model (nn.Module): the network, changed in place.

    Yields:
        nn.Module: the same model, without attached SimAM.

    Raises:
        TypeError, ValueError: as `detach`; also if the block made a host parametrized, or replaced
            or removed a module beside it, as folding does. This host then stays without SimAM.

    Examples:
        >>> net = attach(nn.Sequential(nn.Conv2d(3, 8, 3)), where="0")
        >>> with detached(net):
        ...     print(type(net[0]).__name__)
        Conv2d
        >>> print(type(net[0]).__name__)
        SimAMConv2d
    """
    layers = {path: (model.get_submodule(path), x) for path, x in attached(model).items()}
    parents = [m for m in model.modules() if hosts.is_changed(m) and not hosts.is_host(m)]
    detach(model)
    beside = {path: _modules_beside(path, model) for path in layers}
    try:
        yield model
    finally:
        folded = [path for path in layers if _modules_beside(path, model) != beside[path]]
        for path, (host, layer) in layers.items():
            if path not in folded and not _obstacle(host):
                hosts.insert(host, layer.train(host.training))
        for parent in parents:
            hosts.hide_norm(parent)
            hosts.fold_once(parent)
        for path, (host, _) in layers.items():
            _check_attachable(path, host)
        if folded:
            raise ValueError(
                f"left without SimAM: {first_few(folded)}. The block replaced or removed a module "
                "beside it, as folding a norm does; do that to detach(copy.deepcopy(model)) instead"
            )


def _modules_beside(path: str, model: nn.Module) -> dict[str, nn.Module | None]:
    """The children of the module that holds the module at this path; none if it is gone."""
    try:
        return dict(model.get_submodule(path.rpartition(".")[0])._modules)
    except AttributeError:
        return {}


def _check_other_places(model: nn.Module, place: str, example: Example | None) -> None:
    """Refuse a second SimAM in a branch that has one at another place."""
    present = attached(model).keys()
    if not present:
        return
    hosts_at = {p: {i.path for i in find_insertions(model, p, example)[0]} for p in PLACES}
    for other, paths in hosts_at.items():
        elsewhere = present & paths - hosts_at[place]
        if elsewhere:
            raise ValueError(
                f"{len(elsewhere)} branches have SimAM at place={other!r}: "
                f"{first_few(sorted(elsewhere))}. Remove it first: simam.detach(model)"
            )


def _check_attachable(path: str, host: nn.Module) -> None:
    obstacle = _obstacle(host)
    if obstacle:
        kind = type(host).__name__
        raise ValueError(f"cannot attach SimAM to {path}: this {kind} {obstacle}")


def _obstacle(host: nn.Module) -> str:
    if parametrize.is_parametrized(host):
        return "is parametrized; attach before torch.nn.utils.parametrize, or remove it first"
    if isinstance(host, ScriptModule):
        return "is a TorchScript module; attach before scripting"
    if any(map(is_lazy, host.parameters())):
        return "is lazy and not yet initialised; run the model once first"
    if isinstance(host, nn.Sequential):
        return "would run SimAM as one of its layers; name its last layer"
    if type(host).forward is nn.Module.forward:
        return "has no forward; name a module that has one"
    if "forward" in vars(host):
        return "has a forward of its own on the instance, as folding leaves it; attach before"
    if hasattr(host, "simam") and not hosts.is_host(host):
        return "already has an attribute 'simam' of its own; rename it"
    return ""
