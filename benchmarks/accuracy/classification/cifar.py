"""The paper's networks for images of 32 x 32.

Written from the papers: He et al. 2016 (ResNet, and with identity mappings, PreResNet), Zagoruyko
and Komodakis 2016 (wide ResNet), Sandler et al. 2018 (MobileNetV2). timm has none of them.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNetV2


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions, each followed by its norm; the shortcut has no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(y + shortcut)


class PreBlock(nn.Module):
    """Two convolutions, each after its norm; where the shape changes, the shortcut projects."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class ResNet(nn.Module):
    """Three stages on maps of 32, 16 and 8, with 16, 32 and 64 channels times the width.

    Args:
        block (callable): makes a block of (inputs, outputs, stride).
        depth (int): blocks in a stage.
        width (int): factor of the channels of all stages.
        num_classes (int): outputs.
    """

    def __init__(
        self, block: type[nn.Module], depth: int, width: int = 1, *, num_classes: int
    ) -> None:
        super().__init__()
        norm_first = block is PreBlock
        active = [nn.BatchNorm2d(16), nn.ReLU()]
        self.stem = nn.Sequential(_conv(3, 16), *([] if norm_first else active))
        channels = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width), 1):
            first = block(channels, outputs, 1 if stage == 1 else 2)
            rest = (block(outputs, outputs, 1) for _ in range(depth - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            channels = outputs
        active = [nn.BatchNorm2d(channels), nn.ReLU()]
        self.last = nn.Sequential(*(active if norm_first else []))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.last(x).mean((2, 3)))


def mobilenet_v2(*, num_classes: int) -> nn.Module:
    """torchvision's MobileNetV2 without the first two halvings, which leaves maps of 4 x 4."""
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
    "cifar_preresnet20": partial(ResNet, PreBlock, 3),
    "cifar_preresnet56": partial(ResNet, PreBlock, 9),
    "cifar_preresnet110": partial(ResNet, PreBlock, 18),
    "cifar_wrn16_8": partial(ResNet, PreBlock, 2, 8),
    "cifar_wrn28_10": partial(ResNet, PreBlock, 4, 10),
    "cifar_mobilenet_v2": mobilenet_v2,
}
