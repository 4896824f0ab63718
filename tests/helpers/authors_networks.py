"""The networks of the paper in the authors' structure, and files in the authors' layout.

The networks are written by hand from the paper and the names of the published tensors: SimAM is a
separate module after the 3x3 or depthwise convolution. No code of simam, torchvision or timm is
used, so the networks are an independent reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """The authors' SimAM (shared statistics), by default with the e_lambda of their ImageNet."""

    def __init__(self, *, e_lambda: float = 0.1) -> None:
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        square = (x - x.mean((2, 3), keepdim=True)) ** 2
        variance = square.sum((2, 3), keepdim=True) / (x[0, 0].numel() - 1)
        return x / (1 + torch.exp(-square / (4 * (variance + self.e_lambda)) - 1 / 2))


def conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2 = nn.Sequential(conv(out, out, 3), Attention())
        self.bn2 = nn.BatchNorm2d(out)
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2 = nn.Sequential(conv(width, width, 3, stride, groups), Attention())
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, out, 1), nn.BatchNorm2d(out)
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ResNet(nn.Module):
    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: tuple[int, ...],
        expansion: int = 4,
        width: int = 64,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate(depths):
            out, blocks = 64 * expansion * 2**stage, []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride, out, groups))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 1000)

    def features(self, x: Tensor) -> list[Tensor]:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[-1].mean((2, 3)))


class CifarBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, e_lambda: float | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        second = conv(out, out, 3)
        attention = [] if e_lambda is None else [Attention(e_lambda=e_lambda)]
        self.conv2 = nn.Sequential(second, *attention) if attention else second
        self.bn2 = nn.BatchNorm2d(out)
        adapt = stride > 1 or channels != out
        self.shortcut = nn.Sequential(
            *([conv(channels, out, 1, stride), nn.BatchNorm2d(out)] if adapt else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class CifarResNet(nn.Module):
    """The authors' ResNet for CIFAR, small; with an e_lambda of None as a network without SimAM."""

    def __init__(self, e_lambda: float | None, depth: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4, 3), nn.BatchNorm2d(4)
        channels = 4
        for stage, out in enumerate((4, 8, 16)):
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(CifarBlock(channels, out, stride, e_lambda))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        steps: list[nn.Module] = []
        if expand > 1:
            steps.append(nn.Sequential(conv(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()))
        depthwise = conv(wide, wide, 3, stride, groups=wide)
        steps.append(nn.Sequential(depthwise, Attention(), nn.BatchNorm2d(wide), nn.ReLU6()))
        self.conv = nn.Sequential(*steps, conv(wide, out, 1), nn.BatchNorm2d(out))
        self.skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())]
        channels = 32
        # expansion, channels, depth, stride
        for expand, out, depth, first_stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for number in range(depth):
                stride = first_stride if number == 0 else 1
                layers.append(Inverted(channels, out, stride, expand))
                channels = out
        layers.append(nn.Sequential(conv(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


# The keys are the names in torchvision.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(Basic, (2, 2, 2, 2), expansion=1),
    "resnet34": lambda: ResNet(Basic, (3, 4, 6, 3), expansion=1),
    "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    "resnext50_32x4d": lambda: ResNet(Bottleneck, (3, 4, 6, 3), width=128, groups=32),
    "mobilenet_v2": MobileNetV2,
}


def filled(name: str) -> Any:
    """Build a network in evaluation mode with random tensors, including those of the norms."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    return fill(network.to_empty(device="cpu"))


def fill(network: nn.Module) -> Any:
    """Give every tensor random values, and switch to evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.dim() > 1:  # keeps the size of activations from layer to layer
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif key.endswith(("bias", "mean")):
            tensor.normal_(0, 0.1, generator=generator)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def profiled(network: nn.Module) -> nn.Module:
    """Leave what `thop.profile` leaves: two buffers in every module that it has no rule for."""
    for module in network.modules():
        if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU6)):
            for name in ("total_ops", "total_params"):
                module.register_buffer(name, torch.zeros(1, dtype=torch.float64))
    return network


def optimizer_state() -> dict[str, Any]:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=1e-4)
    weight.grad = torch.ones(3)
    optimizer.step()
    return optimizer.state_dict()


def publish(network: nn.Module, path: Path) -> Path:
    """Write a file in the layout of the authors' ImageNet checkpoints."""
    content = {
        "epoch": 100,
        "arch": "simam",
        "state_dict": nn.DataParallel(network).state_dict(),
        "best_acc": torch.tensor(71.31),
        "optimizer": optimizer_state(),
    }
    torch.save(content, path)
    return path


def publish_cifar(network: nn.Module, path: Path) -> Path:
    """Write a file in the layout of the authors' CIFAR checkpoints: thop runs before the training.

    The last epoch of their public file: 164; the best top-1 accuracy in percent: 69.83.
    """
    content = {
        "epoch": 164,
        "arch": "resnet20",
        "state_dict": profiled(network).state_dict(),
        "best_acc": 69.83,
        "optimizer": optimizer_state(),
    }
    torch.save(content, path)
    return path


def publish_detector(network: nn.Module, path: Path) -> Path:
    """Write a file in the layout of the authors' COCO detection checkpoints."""
    backbone = {
        f"backbone.{key}": tensor
        for key, tensor in network.state_dict().items()
        if not key.startswith("fc.")
    }
    rest = {
        "neck.lateral_convs.0.conv.weight": torch.ones(256, 256, 1, 1),
        "rpn_head.rpn_conv.weight": torch.ones(256, 256, 3, 3),
        "roi_head.bbox_head.fc_cls.bias": torch.ones(81),
    }
    meta = {"epoch": 12, "iter": 87960, "CLASSES": ("person", "bicycle"), "config": "model = dict("}
    torch.save({"meta": meta, "state_dict": backbone | rest, "optimizer": optimizer_state()}, path)
    return path
