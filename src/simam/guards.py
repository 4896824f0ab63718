"""How a host recognises code that would fold, convert or adapt it and lose or misplace SimAM.

Such code only reads attributes before it changes anything, so it is recognised by its frame: which
names it uses, and whose method it is.
"""

from types import FrameType
from typing import Any

from torch import nn

# The names in code that folds a norm, and in code that folds a module by the module's own method.
_READ_TO_FOLD = frozenset({"weight", "running_var", "eps"})
FUSED_FORWARDS = frozenset({"forward_fuse", "fuseforward"})
# What an adapter reads of the layer that it adapts; and the functions of peft that put this layer
# in the place of the adapter.
_READ_TO_ADAPT = frozenset({"weight", "base_layer"})
_UNLOADING = frozenset({"_unload_and_optionally_merge", "unload_and_optionally_merge_module"})

WATCHED = _READ_TO_FOLD | _READ_TO_ADAPT

_FOLDING = (
    "cannot fold or convert this {}: its output passes through SimAM, which would be lost or "
    "misplaced. This module has not been changed. Fold or convert before simam.attach, or a copy "
    "after simam.detach"
)
_ADAPTING = (
    "cannot adapt this {}: SimAM is attached to it, so that an adapter would act behind SimAM, but "
    "before it once it is merged. The layer has not been changed. Adapt first and attach then: "
    "simam.detach(model), get_peft_model(model, config), simam.attach(model)"
)


def check_reader(host: Any, name: str, reader: FrameType) -> None:
    """Refuse code that reads a watched attribute in order to fold, convert or adapt a host.

    Args:
        host (nn.Module): the host.
        name (str): the attribute, one of WATCHED.
        reader (FrameType): the code that reads it.

    Raises:
        RuntimeError: the code folds, converts or adapts.
    """
    if reader.f_code is host.forward_code:
        return
    owner = reader.f_locals.get("self")
    if owner is host:
        return
    # Code that folds a norm into a convolution, or converts a norm, reads the weight and the
    # statistics in one function, whatever it does with the result.
    if name in _READ_TO_FOLD and _READ_TO_FOLD.issubset(reader.f_code.co_names):
        raise RuntimeError(_FOLDING.format(host.plain_class.__name__))
    if name in _READ_TO_ADAPT and _adapts(owner, host):
        raise RuntimeError(_ADAPTING.format(host.plain_class.__name__))


def replaces_forward(reader: FrameType) -> bool:
    """Return whether code puts a module's own folded forward in the place of its forward."""
    return not FUSED_FORWARDS.isdisjoint(reader.f_code.co_names)


def unloads_adapters(reader: FrameType) -> bool:
    """Return whether code puts the layer inside an adapter in the place of the adapter."""
    return reader.f_code.co_name in _UNLOADING


def is_adapter(module: object) -> bool:
    """Return whether the module is an adapter of peft, such as LoRA, around its `base_layer`."""
    is_module = isinstance(module, nn.Module) and hasattr(type(module), "get_base_layer")
    return is_module and isinstance(getattr(module, "base_layer", None), nn.Module)


def _adapts(module: Any, host: nn.Module) -> bool:
    """Return whether a module is an adapter of a host, and not one that the host has left."""
    return is_adapter(module) and module.base_layer is host and not hasattr(module, "is_unloaded")
