"""Networks by name, with the attention layers that are compared."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from timm.layers import create_attn
from torch import nn

import simam
from benchmarks.accuracy.common.sampler import seed_everything
from simam.cli import models
from simam.messages import UserError

from .cifar import NETWORKS, Block, PreActBlock

_MakeLayer: TypeAlias = Callable[[int], nn.Module]  # from the number of channels

# Where in the residual branch SimAM goes.
_PLACES = {"simam": "conv", "simam-post-norm": "norm", "simam-branch": "branch"}

# The norm after which timm puts attention, by the blocks of timm and torchvision.
_NORM = {
    "BasicBlock": "bn2",
    "Bottleneck": "bn3",
    "InvertedResidual": "bn2",
    "DepthwiseSeparableConv": "bn1",
}


def build(
    name: str,
    num_classes: int,
    attention: str = "none",
    e_lambda: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """Build a network with random weights, on the CPU.

    All layers except attention get the same weights whatever the attention, because the weights of
    attention layers are drawn last.

    Args:
        name (str): one of `cifar.NETWORKS`, or a name of torchvision or timm as in
            `simam.cli.models.build`.
        num_classes (int): outputs of the classifier.
        attention (str): one of `options.ATTENTION`. "simam" goes where the paper puts it,
            "simam-post-norm" behind the norm that follows, "simam-branch" to the end of the
            branch. The others go where timm puts attention, behind a norm.
        e_lambda (float): lambda of SimAM.
        seed (int): of the random weights.

    Raises:
        UserError: the name is unknown, or the network has no position for the attention.
    """
    seed_everything(seed)  # for the attention layers too, which models.build does not draw
    if name in NETWORKS:
        model = NETWORKS[name](num_classes=num_classes)
    elif name.startswith("cifar_"):
        raise UserError(f"unknown model {name!r}; expected one of {', '.join(NETWORKS)}")
    else:
        subject = models.build(name, seed=seed, num_classes=num_classes)
        if subject.takes != "batch" or len(subject.input_size) != 3:
            raise UserError(f"{name} does not classify single images; name a model that does")
        model = subject.model.train()
    add_attention(model, attention, e_lambda, name)
    return model


def add_attention(
    model: nn.Module, attention: str, e_lambda: float, name: str = "the model"
) -> None:
    """Insert an attention layer into every block of a network, in place."""
    if attention in _PLACES:
        try:
            simam.attach(model, e_lambda=e_lambda, place=_PLACES[attention])
        except ValueError as error:
            raise UserError(f"--attention {attention}: {name}: {error}") from error
    elif attention != "none":
        make_layer = partial(create_attn, attention)
        inserters = list(_inserters(model))
        if not inserters:
            raise UserError(
                f"--attention {attention}: expected a network with the blocks of ResNet or "
                f"MobileNetV2 and no attention of its own, {name} has no such block; use "
                "--attention simam or none"
            )
        for insert in inserters:
            insert(make_layer)


def _inserters(model: nn.Module) -> Iterator[Callable[[_MakeLayer], None]]:
    """Yield, for each block, a function that inserts a layer after the norm, where timm puts it."""
    for block in model.modules():
        kind = type(block).__name__
        norm = getattr(block, _NORM.get(kind, ""), None)
        if isinstance(block, Block):
            yield partial(_insert_after, block, "bn2", block.bn2.num_features)
        elif isinstance(block, PreActBlock):  # no norm follows the second convolution
            yield partial(_insert_after, block, "conv2", block.conv2.out_channels)
        elif kind == "InvertedResidual" and isinstance(getattr(block, "conv", None), nn.Sequential):
            layers: Any = block.conv
            depthwise = len(layers) - 3  # before the projection and its norm
            channels = layers[depthwise][0].out_channels
            yield partial(_insert_after, layers, str(depthwise), channels)
        elif isinstance(norm, nn.BatchNorm2d):
            if not hasattr(block, "se"):
                yield partial(_insert_after, block, _NORM[kind], norm.num_features)
            elif block.se is None or isinstance(block.se, nn.Identity):
                yield partial(_set_se, block, norm.num_features)


def _insert_after(parent: nn.Module, name: str, channels: int, make_layer: _MakeLayer) -> None:
    """Insert a layer after the parent's child `name`."""
    setattr(parent, name, nn.Sequential(getattr(parent, name), make_layer(channels)))


def _set_se(block: nn.Module, channels: int, make_layer: _MakeLayer) -> None:
    """Put a layer into the unused attribute that timm's block has for attention."""
    block.se = make_layer(channels)
