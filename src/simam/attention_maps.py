"""The gates of a network's SimAM layers in one forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional import attention
from .hosts import is_host
from .modes import temporary_modes
from .module import SimAM
from .placement import check_module


def attention_maps(model: nn.Module, images: Any) -> dict[str, Tensor]:
    """Show what a network attends to: the gate of every SimAM layer for the given images.

    The model runs once, in evaluation mode and without gradients. Afterwards its parameters,
    buffers, hooks and the mode of each module are as before, even if the forward pass fails. A
    compiled model runs uncompiled, since its graphs hide the layers. A `DataParallel` or
    `DistributedDataParallel` model runs in this process only, on the images as given.

    Args:
        model (nn.Module): a network with SimAM layers, attached or its own.
        images (Tensor[N, C, H, W]): the argument of the model's forward, on the model's device
            and in its dtype. A model whose one argument is not a tensor gets it unchanged.

    Returns:
        dict[str, Tensor[N, C, *spatial]]: gates from sigmoid(1/2) = 0.622 to 1 by path, in the
            order of the calls, in the dtype of the layer's input. The path of an attached layer
            is the path of its host, as in `simam.plan`; any other layer has its own path. Later
            calls of the same layer are `path#2`, `path#3` and so on. Layers that are not called
            are left out.

    Raises:
        TypeError: model is not a module.
        ValueError: the model has no SimAM layer, or the forward pass calls none.

    Source:
        Yang et al., ICML 2021, the factor in equation 6.

    Examples:
        >>> net = nn.Sequential(nn.AvgPool2d(2), SimAM())
        >>> attention_maps(net, torch.arange(16.0).reshape(1, 1, 4, 4))
        {'1': tensor([[[[0.6848, 0.6455],
                  [0.6455, 0.6848]]]])}
    """
    check_module(model)
    model = _unwrap(model)
    layers = _find_layers(model)
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no SimAM layer: insert SimAM with "
            "simam.attach(model). For a scripted, traced or exported model, pass the original model"
        )
    gates: dict[str, Tensor] = {}

    def record(path: str) -> Callable[..., None]:
        calls = 0

        def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            nonlocal calls
            calls += 1
            (x,) = (*args, *kwargs.values())
            key = f"{path}#{calls}" if calls > 1 else path
            gates[key] = attention(x, layer.e_lambda, statistics=layer.statistics)

        return hook

    hooks = []
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        temporary_modes(model),
        _scratch_buffers(model),
    ):
        try:
            for layer, path in layers.items():
                hooks.append(layer.register_forward_pre_hook(record(path), with_kwargs=True))
            model(images)
        finally:
            for hook in hooks:
                hook.remove()
    if not gates:
        raise ValueError(
            f"the forward pass of this {type(model).__name__} called none of its SimAM layers: "
            f"{', '.join(layers.values())}"
        )
    return gates


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _unwrap(compiled)


@contextmanager
def _scratch_buffers(model: nn.Module) -> Iterator[None]:
    """Replace every buffer by a copy for a while: observers write to buffers in every mode.

    functional_call would not restore the buffers of a module that a model holds at two paths.
    """
    copies = {buffer: buffer.clone() for buffer in model.buffers()}
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        for module, name, buffer in buffers:
            setattr(module, name, copies[buffer])
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def _find_layers(model: nn.Module) -> dict[SimAM, str]:
    """Every SimAM layer once, with the path that users know it by."""
    layers: dict[SimAM, str] = {}
    for path, module in model.named_modules():
        layer = module.simam if is_host(module) else module
        if isinstance(layer, SimAM):
            layers.setdefault(layer, path)
    return layers
