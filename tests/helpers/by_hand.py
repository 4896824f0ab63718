"""Real networks with SimAM inserted by hand: a second implementation of what attach does.

The hosts were written down from the definitions of the networks, and the layer from the
formula of the paper. Nothing here comes from the library.
"""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class ByHand(nn.Module):
    """A layer followed by the shared form of SimAM."""

    def __init__(self, layer: nn.Module, e_lambda: float) -> None:
        super().__init__()
        self.layer = layer
        self.e_lambda = e_lambda

    def forward(self, *args: Any) -> Tensor:
        x = self.layer(*args)
        spatial = tuple(range(2, x.dim()))
        wide = x if x.dtype == torch.float64 else x.float()
        square = (wide - wide.mean(spatial, keepdim=True)) ** 2
        variance = square.sum(spatial, keepdim=True) / (x[0, 0].numel() - 1)
        gate = 1 / (1 + torch.exp(-square / (4 * (variance + self.e_lambda)) - 1 / 2))
        return (wide * gate).to(x.dtype)


def blocks(path: str, depths: Iterable[int], first: int = 0) -> list[str]:
    """Paths for every stage, numbered from `first`, and every block of the stage."""
    return [
        path.format(stage=stage, block=block)
        for stage, depth in enumerate(depths, first)
        for block in range(depth)
    ]


RESNET_18 = blocks("layer{stage}.{block}.conv2", (2, 2, 2, 2), 1)
RESNET_50 = blocks("layer{stage}.{block}.conv2", (3, 4, 6, 3), 1)

# The hosts of SimAM. A MixedConv2d is one host, since it concatenates its convolutions.
HOSTS = {
    "torchvision/resnet18": RESNET_18,
    "torchvision/mobilenet_v2": [
        "features.1.conv.0.0",  # the first block does not expand
        *(f"features.{block}.conv.1.0" for block in range(2, 18)),
    ],
    "torchvision/efficientnet_b0": [
        "features.1.0.block.0.0",
        *blocks("features.{stage}.{block}.block.1.0", (2, 2, 3, 3, 4, 1), 2),
    ],
    "torchvision/convnext_tiny": [
        *(f"features.1.{block}.block.0" for block in range(3)),
        *(f"features.3.{block}.block.0" for block in range(3)),
        *(f"features.5.{block}.block.0" for block in range(9)),
        *(f"features.7.{block}.block.0" for block in range(3)),
    ],
    "torchvision/regnet_y_400mf": blocks(
        "trunk_output.block{stage}.block{stage}-{block}.f.b.0", (1, 3, 6, 6), 1
    ),
    "torchvision/r3d_18": [f"{path}.0" for path in RESNET_18],
    "torchvision/fasterrcnn_resnet50_fpn": [f"backbone.body.{path}" for path in RESNET_50],
    "timm/resnet50": RESNET_50,
    # Conv2dSame
    "timm/tf_mobilenetv3_small_minimal_100": blocks(
        "blocks.{stage}.{block}.conv_dw", (1, 2, 3, 2, 3)
    ),
    # StdConv2d
    "timm/resnetv2_50x1_bit": blocks("stages.{stage}.blocks.{block}.conv2", (3, 4, 6, 3)),
    # MixedConv2d
    "timm/tf_mixnet_s": blocks("blocks.{stage}.{block}.conv_dw", (1, 2, 4, 3, 3, 3)),
    # CondConv2d, whose forward takes the weights of its experts
    "timm/tf_efficientnet_cc_b0_4e": blocks(
        "blocks.{stage}.{block}.conv_dw", (1, 2, 2, 3, 3, 4, 1)
    ),
}


QUICK = {"torchvision/resnet18", "torchvision/r3d_18", "timm/tf_mobilenetv3_small_minimal_100"}


# One network for each class of host: Conv2d, Conv3d and the subclasses of timm.
EVERY_CLASS = QUICK | {
    "timm/resnetv2_50x1_bit",
    "timm/tf_mixnet_s",
    "timm/tf_efficientnet_cc_b0_4e",
}


def sampled(sample: set[str]) -> list[object]:
    """Test cases for every network; those outside the sample are marked sweep."""
    return [pytest.param(name, marks=[] if name in sample else pytest.mark.sweep) for name in HOSTS]


def networks() -> list[object]:
    """Test cases for every network that is one graph; all but the quick ones are marked sweep.

    A detector is not. It branches on its proposals, with or without SimAM.
    """
    return [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.sweep)
        for name in HOSTS
        if "rcnn" not in name
    ]


def plain(name: str) -> nn.Module:
    """The network with random weights; no tensor is constant."""
    library, name = name.split("/")
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 10}
    if library == "timm":
        timm = pytest.importorskip("timm", reason="builds the network")
        model = timm.create_model(name, **options)
    else:
        torchvision = pytest.importorskip("torchvision", reason="builds the network")
        if "rcnn" in name:
            options |= {"weights_backbone": None, "box_score_thresh": 0.0}
            options |= {"min_size": 64, "max_size": 64}
        model = torchvision.models.get_model(name, weights=None, **options)
    with torch.no_grad():
        # A scale of 0 hides a branch; a norm with weight 1 and bias 0 hides a wrong order.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
                tensor.add_(0.5 * torch.rand_like(tensor))
    return model


def by_hand(model: nn.Module, name: str, e_lambda: float) -> nn.Module:
    """A copy of the network with SimAM inserted by hand."""
    model = copy.deepcopy(model)
    for path in HOSTS[name]:
        parent, _, child = path.rpartition(".")
        layer = getattr(model.get_submodule(parent), child)
        setattr(model.get_submodule(parent), child, ByHand(layer, e_lambda))
    return model


def parameter_names(model: nn.Module) -> list[str]:
    """The parameter names of the plain network, from a network with SimAM inserted by hand."""
    names = [name for name, _ in model.named_parameters()]
    return [name.replace(".layer.", ".") for name in names]


def example(name: str) -> Tensor:
    """Images just large enough for every map to have more than one position."""
    size = (2, 3, 4, 32, 32) if "r3d" in name else (2, 3, 64, 64)
    if "convnext" not in name and "rcnn" not in name and "r3d" not in name:
        size = (2, 3, 33, 33)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output as one tensor; for a detector its losses in training, its detections otherwise."""
    if not hasattr(model, "roi_heads"):
        return model(x)
    images = list(x)
    box = x.new_tensor([[8, 8, 40, 48]])
    targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in images]
    if model.training:
        return torch.stack([*model(images, targets).values()])
    return torch.cat([torch.cat([d["boxes"].flatten(), d["scores"]]) for d in model(images)])
