"""Insert SimAM into an existing network, and take it out again.

A convolution gets a child `simam` and a subclass of its own class whose forward passes the
output through that child, as torch's parametrizations do. No parameter or buffer is renamed;
`print`, `modules`, copying, pickling, compiling and exporting treat it like any other layer.
"""

import sys
import warnings
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .module import SimAM
from .placement import Selector, check_module, list_unanalysed, plan

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    *,
    e_lambda: float = 1e-4,
    statistics: str = "shared",
    where: Selector | None = None,
    exclude: Selector | None = None,
) -> Model:
    """Insert SimAM into a network, in place, without renaming a parameter or a buffer.

    State dicts of the plain network load before and after. A pretrained network loses its accuracy
    at first: its batch norms now see inputs scaled by 0.62 to 1. Fine-tune it. Without
    fine-tuning, `recalibrate` restores most of the accuracy; the fewer stages get SimAM, the more.

    A convolution that already has a SimAM gets a new one with the new options. Convolutions outside
    the selection keep theirs. Fold re-parameterisable blocks (`fuse`, timm's
    `reparameterize_model`) before attaching: folding afterwards drops the SimAM layers.

    Args:
        model (nn.Module): the network.
        e_lambda (float): the regulariser lambda; see `simam.functional.simam`. The authors use
            0.1 on ImageNet and COCO.
        statistics (str): "shared" or "leave_one_out".
        where (str, iterable of str, or callable, optional): see `plan`.
        exclude (str, iterable of str, or callable, optional): see `plan`.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError, ValueError: as `SimAM` and `plan`; also if a convolution is parametrized, lazy or
            scripted, or has an attribute `simam` of its own. The model is then unchanged.

    Warns:
        UserWarning: a block that may be residual could not be analysed and gets no SimAM.

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
    planned = plan(model, where=where, exclude=exclude)
    convolutions = [model.get_submodule(insertion.path) for insertion in planned]
    for insertion, convolution in zip(planned, convolutions, strict=True):
        _check_attachable(insertion.path, convolution)
    if planned.unanalysed:
        warnings.warn(
            "left without SimAM, because they could not be analysed: "
            f"{list_unanalysed(planned.unanalysed)}. Choose convolutions with where=, or name the "
            "blocks in exclude= to accept this.",
            stacklevel=2,
        )
    for convolution in convolutions:
        convolution.simam = SimAM(e_lambda=e_lambda, statistics=statistics).train(
            convolution.training
        )
        if not isinstance(convolution, _WithSimAM):
            plain_class: Any = type(convolution)
            convolution.__class__ = _with_simam(plain_class)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`, in place: every convolution gets its class back and loses its SimAM.

    A model without attached SimAM is returned unchanged.

    Args:
        model (nn.Module): the network.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError: model is not a module.
        ValueError: the class of a convolution with SimAM has changed since, as parametrizations
            do. The model is then unchanged.

    Examples:
        >>> detach(attach(nn.Sequential(nn.Conv2d(3, 8, 3)), where="0"))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    check_module(model)
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

    plain_class: type

    def __setattr__(self, name: str, value: Any) -> None:
        # Folding a batch norm into the convolution would move the norm before SimAM. Torch folds by
        # assigning to a copy. Other code does so too; there the only sign is a new bias, since a
        # convolution before a batch norm usually has none.
        folded_by_torch = sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.fusion"
        gets_a_bias = name == "bias" and value is not None and getattr(self, name, value) is None
        if folded_by_torch or gets_a_bias:
            raise RuntimeError(
                "cannot give this convolution a bias, as folding a batch norm into it does: "
                "SimAM comes between the two. Fold before simam.attach, or simam.detach first"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot import the subclass by name, but it can import the plain class.
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.plain_class,), *reduced[2:]


def _new(plain_class: type) -> Any:
    kind = _with_simam(plain_class)
    return kind.__new__(kind)


@cache
def _with_simam(plain_class: Any) -> Any:
    plain_forward = plain_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.simam(plain_forward(self, *args, **kwargs))

    scriptable = plain_forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    members = {
        "__doc__": f"{plain_class.__name__}, its output passed through the child `simam`.",
        # The module of the plain class, so that torch.fx treats both classes as leaves alike.
        "__module__": plain_class.__module__,
        "plain_class": plain_class,
        "forward": _scriptable_forward if scriptable else forward,
    }
    return type(f"SimAM{plain_class.__name__}", (_WithSimAM, plain_class), members)


def _scriptable_forward(self: Any, input: Tensor) -> Tensor:
    # TorchScript supports neither super() nor variable arguments.
    output: Tensor = self.simam(self._conv_forward(input, self.weight, self.bias))
    return output


def _check_attachable(path: str, convolution: nn.Module) -> None:
    kind = type(convolution)
    if parametrize.is_parametrized(convolution):
        problem = "is parametrized; attach before torch.nn.utils.parametrize, or remove it first"
    elif isinstance(convolution, ScriptModule):
        problem = "is a TorchScript module; attach before scripting"
    elif any(map(is_lazy, convolution.parameters())):
        problem = "is lazy and not yet initialised; run the model once first"
    elif hasattr(convolution, "simam") and not isinstance(convolution, _WithSimAM):
        problem = "already has an attribute 'simam' of its own; rename it"
    else:
        return
    raise ValueError(f"cannot attach SimAM to {path}: this {kind.__name__} {problem}")
