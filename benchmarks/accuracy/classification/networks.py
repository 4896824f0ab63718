"""Networks by name, with the attention that is compared."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

import simam
from benchmarks.accuracy.common.sampler import seed_everything
from simam.cli import models as zoo
from simam.messages import UserError

from .cifar import NETWORKS, Block, PreBlock

ATTENTION = ("none", "simam", "simam-post-norm", "se", "eca", "cbam", "gc")

# The norm after which timm puts attention, of blocks with the names of timm and torchvision.
_NORM = {
    "BasicBlock": "bn2",
    "Bottleneck": "bn3",
    "InvertedResidual": "bn2",
    "DepthwiseSeparableConv": "bn1",
}


def build(
    name: str, classes: int, attention: str = "none", e_lambda: float = 0.1, number: int = 0
) -> nn.Module:
    """Build a network with random weights, on the CPU.

    Every attention starts from the same weights in the layers that all have, since its own are
    drawn after them.

    Args:
        name (str): one of `cifar.NETWORKS`, or a name of torchvision or timm as for `zoo.build`.
        classes (int): number of classes.
        attention (str): one of `ATTENTION`: "simam" goes where the paper puts it, the rest where
            timm does, after the norm.
        e_lambda (float): of SimAM.
        number (int): the seed.

    Raises:
        UserError: the name is unknown, or the network has no place for the attention.
    """
    seed_everything(number)  # also of what zoo.build leaves to the layers of attention
    if name in NETWORKS:
        model = NETWORKS[name](num_classes=classes)
    elif name.startswith("cifar_"):
        raise UserError(f"unknown model {name!r}; expected one of {', '.join(NETWORKS)}")
    else:
        subject = zoo.build(name, seed=number, num_classes=classes)
        if subject.takes != "batch" or len(subject.input_size) != 3:
            raise UserError(f"{name} does not classify single images; name a model that does")
        model = subject.model.train()
    add(model, attention, e_lambda, name)
    return model


def add(model: nn.Module, attention: str, e_lambda: float, name: str = "the model") -> None:
    """Put attention into every block of a network, in place."""
    if attention == "simam":
        try:
            simam.attach(model, e_lambda=e_lambda)
        except ValueError as error:
            raise UserError(f"--attention simam: {name}: {error}") from error
    elif attention != "none":
        make = _layer(attention, e_lambda)
        places = list(_places(model))
        if not places:
            raise UserError(
                f"--attention {attention}: expected a network with the blocks of ResNet or "
                f"MobileNetV2 without attention of their own, {name} has none; take "
                "--attention simam or none"
            )
        for place in places:
            place(make)


def _layer(attention: str, e_lambda: float) -> Callable[[int], nn.Module]:
    """Makes the layer for so many channels."""
    if attention == "simam-post-norm":
        return partial(simam.SimAM, e_lambda=e_lambda)
    from timm.layers import create_attn

    return partial(create_attn, attention)


def _places(model: nn.Module) -> Iterator[Callable[[Callable[[int], nn.Module]], None]]:
    """What puts a layer into each block, after the norm where timm has it."""
    for block in model.modules():
        kind = type(block).__name__
        norm = _NORM.get(kind, "")
        if isinstance(block, Block):
            yield partial(_follow, block, "bn2", block.bn2.num_features)
        elif isinstance(block, PreBlock):  # no norm follows the second convolution
            yield partial(_follow, block, "conv2", block.conv2.out_channels)
        elif kind == "InvertedResidual" and isinstance(getattr(block, "conv", None), nn.Sequential):
            depthwise = len(block.conv) - 3  # before the projection and its norm
            channels = block.conv[depthwise][0].out_channels
            yield partial(_follow, block.conv, str(depthwise), channels)
        elif isinstance(getattr(block, norm, None), nn.BatchNorm2d):
            channels = getattr(block, norm).num_features
            if not hasattr(block, "se"):
                yield partial(_follow, block, norm, channels)
            elif block.se is None or isinstance(block.se, nn.Identity):
                yield partial(_fill, block, channels)


def _follow(parent: nn.Module, name: str, channels: int, make: Callable[[int], nn.Module]) -> None:
    """Put a layer behind one of the parent's."""
    setattr(parent, name, nn.Sequential(getattr(parent, name), make(channels)))


def _fill(block: nn.Module, channels: int, make: Callable[[int], nn.Module]) -> None:
    """Put a layer where timm's block has room for one."""
    block.se = make(channels)
