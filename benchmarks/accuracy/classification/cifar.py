"""The paper's networks for images of 32 x 32 pixels, which timm and torchvision lack.

Written from the papers: He et al. 2016 (ResNet, and PreResNet, which has identity mappings),
Zagoruyko and Komodakis 2016 (wide ResNet), Sandler et al. 2018 (MobileNetV2).
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNetV2


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions, each followed by its norm; the shortcut has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            _conv(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
        )
        self.conv2, self.bn2 = _conv(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.stride, self.added_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        subsampled = x[..., :: self.stride, :: self.stride]
        return F.relu(y + F.pad(subsampled, (0, 0, 0, 0, 0, self.added_channels)))


class PreActBlock(nn.Module):
    """Two convolutions, each preceded by its norm; a 1x1 convolution adapts the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), _conv(in_channels, out_channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_channels), _conv(out_channels, out_channels)
        self.shortcut = None  # the identity, unless the shape changes
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class ResNet(nn.Module):
    """Three stages, on maps of 32, 16 and 8 pixels with 16, 32 and 64 channels times the width.

    Args:
        block (type): called with (in_channels, out_channels, stride).
        depth (int): blocks per stage.
        width (int): factor of the channels of all stages.
        num_classes (int): outputs of the classifier.
    """

    def __init__(
        self,
        block: type[Block] | type[PreActBlock],
        depth: int,
        width: int = 1,
        *,
        num_classes: int,
    ) -> None:
        super().__init__()
        norm_first = block is PreActBlock
        self.stem = nn.Sequential(_conv(3, 16), *([] if norm_first else _norm_relu(16)))
        channels = 16
        stages = []
        for out_channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            first = block(channels, out_channels, stride)
            rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *rest))
            channels = out_channels
        self.layer1, self.layer2, self.layer3 = stages
        self.last = nn.Sequential(*(_norm_relu(channels) if norm_first else []))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        scores: Tensor = self.fc(self.last(x).mean((2, 3)))
        return scores


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def mobilenet_v2(*, num_classes: int) -> MobileNetV2:
    """torchvision's MobileNetV2 without its first two strides; its last maps are 4 x 4."""
    stages = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model = MobileNetV2(num_classes=num_classes, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": partial(ResNet, Block, 3),
    "cifar_resnet56": partial(ResNet, Block, 9),
    "cifar_resnet110": partial(ResNet, Block, 18),
    "cifar_preresnet20": partial(ResNet, PreActBlock, 3),
    "cifar_preresnet56": partial(ResNet, PreActBlock, 9),
    "cifar_preresnet110": partial(ResNet, PreActBlock, 18),
    "cifar_wrn16_8": partial(ResNet, PreActBlock, 2, 8),
    "cifar_wrn28_10": partial(ResNet, PreActBlock, 4, 10),
    "cifar_mobilenet_v2": mobilenet_v2,
}
