"""The gates of a network's SimAM layers in one forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attach import _WithSimAM
from .functional import attention
from .module import SimAM
from .placement import check_module


def attention_maps(model: nn.Module, images: Any) -> dict[str, Tensor]:
    """Show what a network attends to: the gate of every SimAM layer for the images given.

    The model runs once, in evaluation mode and without gradients, and is left as it was: its
    parameters and buffers, the mode of each module, and its hooks, also if the pass fails. A
    compiled model runs uncompiled, so the layers inside can be seen; a parallel one runs on this
    process alone, on the images as they are.

    Args:
        model (nn.Module): a network with SimAM, attached or part of it.
        images (Tensor[N, C, H, W]): what the model's forward takes, on its device and in its
            dtype. Models that take something else as their one argument get that.

    Returns:
        dict[str, Tensor[N, C, *spatial]]: gates from sigmoid(1/2) = 0.622 to 1 by path, in the
            order of the calls, in the dtype of the layer's input. An attached layer goes by the
            path of its convolution, as in `simam.plan`, any other by its own. Later calls of the
            same layer are `path#2`, `path#3` and so on; layers that are not called are left out.

    Raises:
        TypeError: model is not a module.
        ValueError: the model has no SimAM, or the pass calls none.

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
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no SimAM layer: put SimAM in with "
            "simam.attach(model). Of a scripted, traced or exported model, give the original"
        )
    gates: dict[str, Tensor] = {}

    def record(path: str) -> Callable[..., None]:
        calls = 0

        def hook(layer: Any, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            nonlocal calls
            calls += 1
            (x,) = (*args, *named.values())
            key = f"{path}#{calls}" if calls > 1 else path
            gates[key] = attention(x, layer.e_lambda, statistics=layer.statistics)

        return hook

    hooks = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _left_as_it_is(model):
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
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, with copies of the buffers: observers write to them even then.

    By hand, since train() of a module may have other effects, and functional_call does not put
    back the buffers of a module that a model has at two paths.
    """
    copies = {buffer: buffer.clone() for buffer in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer)
        for module in modes
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        for module in modes:
            module.training = False
        for module, name, buffer in buffers:
            setattr(module, name, copies[buffer])
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for module, training in modes.items():
            module.training = training


def _layers(model: nn.Module) -> dict[SimAM, str]:
    """Every SimAM once, with the path that users know it by."""
    layers: dict[SimAM, str] = {}
    for path, module in model.named_modules():
        layer = module.simam if isinstance(module, _WithSimAM) else module
        if isinstance(layer, SimAM):
            layers.setdefault(layer, path)
    return layers
