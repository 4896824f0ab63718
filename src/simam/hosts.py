"""The change of class that makes a module the host of a SimAM layer, as parametrizations do it.

A host gets a child `simam` and a subclass of its own class whose forward passes the output through
that child. Other code may rebuild, fold or copy a host; it must not lose SimAM without an error:
`guards` recognises such code.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, update_wrapper
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .guards import (
    FUSED_FORWARDS,
    WATCHED,
    check_reader,
    replaces_forward,
    unloads_adapters,
)
from .module import SimAM

_NEW_BIAS = (
    "cannot give this convolution a bias, as folding a batch norm into it does, because SimAM "
    "comes between the two. Fold before simam.attach, or fold a copy after simam.detach. If the "
    "weight has been scaled for the folding already, load the weights again"
)


def is_host(module: object) -> bool:
    """Return whether `insert` made the module a host."""
    return isinstance(module, _Host)


def insert(host: nn.Module, layer: SimAM) -> None:
    """Make a module the host of a SimAM layer, or replace the layer of a host."""
    host.simam = layer
    if not is_host(host):
        _change_class(host, _host_class)


def hide_norm(parent: nn.Module) -> None:
    """Keep a norm with SimAM before or behind it from the folding of Ultralytics and its family.

    They fold every module that has `conv`, `bn` and `forward_fuse`, unasked, in predict, val and
    export. A module of another kind is left as it is.
    """
    children = parent._modules
    is_pair = "bn" in children and (is_host(children.get("conv")) or is_host(children["bn"]))
    if _can_be_folded(parent) and is_pair and not isinstance(parent, _NormHidden):
        _change_class(parent, _norm_hidden_class)


def fold_once(module: nn.Module) -> None:
    """Keep a block that folds itself, as YOLOv10's RepVGGDW, from being folded a second time.

    Ultralytics 8.3 folds a network again while it has ten norms, and such a block fails then. The
    norms that `hide_norm` keeps count. A module of another kind is left as it is.
    """
    if _can_be_folded(module) and hasattr(type(module), "fuse") and not is_changed(module):
        _change_class(module, _folded_once_class)


def is_changed(module: object) -> bool:
    """Return whether a function of this file changed the class of the module."""
    return isinstance(module, _Changed)


def class_was_changed_since(module: Any) -> bool:
    """Return whether a changed module has another class than it got here."""
    return type(module) is not module.make_class(module.plain_class)


def undo(module: Any) -> None:
    """Undo `insert`, `hide_norm` or `fold_once`."""
    if is_host(module):
        del module.simam
    module.__class__ = module.plain_class


def _can_be_folded(module: nn.Module) -> bool:
    return any(hasattr(type(module), name) for name in FUSED_FORWARDS)


def _change_class(module: Any, make_class: Callable[[Any], type]) -> None:
    module.__class__ = make_class(type(module))


class _Changed(nn.Module):
    """A module whose class was replaced by a subclass."""

    plain_class: type
    make_class: Callable[[Any], type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Libraries build a layer like a given one by type(layer)(...). The new layer has no SimAM.
        if args or kwargs:
            return cls.plain_class(*args, **kwargs)
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot import the subclass by name, but it can import the plain class.
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.make_class, self.plain_class), *reduced[2:]


def _new(make_class: Callable[[Any], type], plain_class: Any) -> Any:
    kind: Any = make_class(plain_class)
    return kind.__new__(kind)


class _Host(_Changed):
    """A module whose output passes through its child `simam`."""

    forward_code: CodeType | None

    def __getattr__(self, name: str) -> Any:
        if name in WATCHED and not torch.compiler.is_compiling():  # compiled code has no frames
            check_reader(self, name, sys._getframe(1))
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Assignment of a parameter calls this, too. A convolution before a batch norm usually has
        # no bias, so a new bias is the second sign of folding.
        if name == "bias" and param is not None and self._parameters.get("bias", param) is None:
            raise RuntimeError(_NEW_BIAS)
        super().register_parameter(name, param)


class _NormHidden(_Changed):
    """A convolution with its norm and activation, which is not to be folded."""

    def __getattr__(self, name: str) -> Any:
        # Code that folds in this way asks for a norm and replaces forward by forward_fuse, in one
        # function. It skips a module that has no norm.
        if (
            name == "bn"
            and not torch.compiler.is_compiling()
            and self._is_hidden_from(sys._getframe(1))
        ):
            raise AttributeError("SimAM comes between this norm and its convolution")
        return super().__getattr__(name)

    def _is_hidden_from(self, reader: FrameType) -> bool:
        return replaces_forward(reader) and any(map(is_host, self._modules.values()))


class _FoldedOnce(_Changed):
    """A block that is folded by its own method `fuse`, at most once."""

    def fuse(self, *args: Any, **kwargs: Any) -> Any:
        # The code that calls this puts `forward_fuse` in the place of `forward` afterwards.
        if "forward" not in vars(self):
            return super().fuse(*args, **kwargs)  # type: ignore[misc]
        return None


@cache
def _host_class(plain_class: Any) -> type:
    plain_forward = plain_class.forward
    signature = tuple(inspect.signature(plain_forward).parameters)
    members = {
        "__doc__": f"{plain_class.__name__}, its output passed through the child `simam`.",
        "forward": _SCRIPTABLE.get(signature, _then_simam(plain_forward)),
        "_plain_forward": _renamed(plain_forward, "_plain_forward"),
        "forward_code": getattr(plain_forward, "__code__", None),
    }
    # Folding puts one of these methods in the place of `forward`.
    members |= {
        name: _then_simam(getattr(plain_class, name))
        for name in FUSED_FORWARDS
        if hasattr(plain_class, name)
    }
    if hasattr(plain_class, "get_base_layer"):
        members["get_base_layer"] = _get_base_layer
    return _subclass(_Host, plain_class, f"SimAM{plain_class.__name__}", _host_class, members)


def _renamed(function: Any, name: str) -> Any:
    """A copy of a method under another name; TorchScript goes by the name of the function."""
    if not isinstance(function, FunctionType):
        return function
    parts = (function.__globals__, name, function.__defaults__, function.__closure__)
    return update_wrapper(FunctionType(function.__code__, *parts), function, ("__annotations__",))


def _then_simam(plain_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.simam(plain_forward(self, *args, **kwargs))

    return forward


def _get_base_layer(self: Any) -> Any:
    """Return the layer inside an adapter; if it is to replace the adapter, with SimAM."""
    base_layer = self.plain_class.get_base_layer(self)
    if unloads_adapters(sys._getframe(1)):
        layer, self.is_unloaded = self.simam, True
        undo(self)
        insert(base_layer, layer)
    return base_layer


@cache
def _norm_hidden_class(plain_class: Any) -> type:
    members = {"__doc__": f"{plain_class.__name__}, whose norm is not folded."}
    return _subclass(_NormHidden, plain_class, plain_class.__name__, _norm_hidden_class, members)


@cache
def _folded_once_class(plain_class: Any) -> type:
    members = {"__doc__": f"{plain_class.__name__}, which is folded at most once."}
    return _subclass(_FoldedOnce, plain_class, plain_class.__name__, _folded_once_class, members)


def _subclass(
    mixin: type, plain_class: Any, name: str, make_class: Any, members: dict[str, Any]
) -> type:
    members |= {
        # The module of the plain class, so that torch.fx treats both classes as leaves alike.
        "__module__": plain_class.__module__,
        "plain_class": plain_class,
        "make_class": staticmethod(make_class),
    }
    return type(name, (mixin, plain_class), members)


# TorchScript supports neither variable arguments nor super().
def _forward_input(self: Any, input: Tensor) -> Tensor:
    output: Tensor = self.simam(self._plain_forward(input))
    return output


def _forward_x(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.simam(self._plain_forward(x))
    return output


_SCRIPTABLE: dict[tuple[str, ...], Callable[..., Tensor]] = {
    ("self", "input"): _forward_input,
    ("self", "x"): _forward_x,
}
