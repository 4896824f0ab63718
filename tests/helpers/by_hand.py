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


# The residual blocks of the networks that are tested at the other places.
RESNET_50_BLOCKS = blocks("layer{stage}.{block}", (3, 4, 6, 3), 1)
GHOST_BLOCKS = blocks("blocks.{stage}.{block}", (1, 1, 1, 1, 1, 1, 5, 1, 4))
HRNET_BOTTLENECKS = ["layer1.0", *(f"incre_modules.{branch}.0" for branch in range(4))]
HRNET_BASIC_BLOCKS = [
    f"stage{stage}.0.branches.{branch}.{block}"
    for stage in (2, 3, 4)
    for branch in range(stage)
    for block in range(2)
]
REGNETY_008_BLOCKS = [
    f"s{stage}.b{block + 1}" for stage, n in enumerate((1, 3, 8, 2), 1) for block in range(n)
]
DLA_BLOCKS = [
    *(f"level{level}.{tree}" for level in (2, 5) for tree in ("tree1", "tree2")),
    *(f"level{level}.{half}.{tree}"
      for level in (3, 4) for half in ("tree1", "tree2") for tree in ("tree1", "tree2")),
]  # fmt: skip


def in_each(blocks: Iterable[str], child: str) -> list[str]:
    """The paths of a child of every block."""
    return [f"{block}.{child}" for block in blocks]


def mobile(depths: Iterable[int]) -> dict[str, list[str]]:
    """Hosts of timm's MobileNets: one separable block, then inverted residuals of these depths."""
    inverted = blocks("blocks.{stage}.{block}", depths, 1)
    return {
        "norm": ["blocks.0.0.bn1", *in_each(inverted, "bn2")],
        "branch": ["blocks.0.0.bn2", *in_each(inverted, "bn3")],
    }


# The hosts behind the norm, and at the end of the branch.
HOSTS_ELSEWHERE = {
    "torchvision/resnet18": dict.fromkeys(
        ("norm", "branch"), blocks("layer{stage}.{block}.bn2", (2, 2, 2, 2), 1)
    ),
    "torchvision/resnet50": {
        "norm": in_each(RESNET_50_BLOCKS, "bn2"),
        "branch": in_each(RESNET_50_BLOCKS, "bn3"),
    },
    "torchvision/mobilenet_v2": {
        "norm": ["features.1.conv.0.1", *(f"features.{block}.conv.1.1" for block in range(2, 18))],
        "branch": ["features.1.conv.2", *(f"features.{block}.conv.3" for block in range(2, 18))],
    },
    "torchvision/efficientnet_b0": {
        "norm": [
            "features.1.0.block.0.1",
            *blocks("features.{stage}.{block}.block.1.1", (2, 2, 3, 3, 4, 1), 2),
        ],
        "branch": [
            "features.1.0.block.2.1",
            *blocks("features.{stage}.{block}.block.3.1", (2, 2, 3, 3, 4, 1), 2),
        ],
    },
    "torchvision/regnet_y_400mf": {
        "norm": blocks("trunk_output.block{stage}.block{stage}-{block}.f.b.1", (1, 3, 6, 6), 1),
        "branch": blocks("trunk_output.block{stage}.block{stage}-{block}.f.c.1", (1, 3, 6, 6), 1),
    },
    "timm/resnet50": {
        "norm": in_each(RESNET_50_BLOCKS, "bn2"),
        "branch": in_each(RESNET_50_BLOCKS, "bn3"),
    },
    # squeeze-and-excitation at the end of the branch
    "timm/seresnet18": {
        "norm": blocks("layer{stage}.{block}.bn2", (2, 2, 2, 2), 1),
        "branch": blocks("layer{stage}.{block}.se", (2, 2, 2, 2), 1),
    },
    # pre-activation: the norm that follows is that of the last convolution, with its activation
    "timm/resnetv2_50x1_bit": {
        "norm": blocks("stages.{stage}.blocks.{block}.norm3", (3, 4, 6, 3)),
        "branch": blocks("stages.{stage}.blocks.{block}.conv3", (3, 4, 6, 3)),
    },
    "timm/mobilenetv2_100": mobile((2, 3, 4, 3, 3, 1)),
    "timm/mobilenetv3_small_100": mobile((2, 3, 2, 3)),
    "timm/efficientnet_b0": mobile((2, 2, 3, 3, 4, 1)),
    "timm/mnasnet_100": mobile((3, 3, 3, 2, 4, 1)),
    # one norm behind several convolutions
    "timm/tf_mixnet_s": mobile((2, 4, 3, 3, 3)),
    "timm/fbnetc_100": {
        "norm": blocks("blocks.{stage}.{block}.bn2", (1, 3, 4, 4, 4, 4, 1)),
        "branch": blocks("blocks.{stage}.{block}.bn3", (1, 3, 4, 4, 4, 4, 1)),
    },
    # separable blocks alone, none of them with a skip
    "timm/lcnet_050": {
        "norm": blocks("blocks.{stage}.{block}.bn1", (1, 2, 2, 2, 4, 2)),
        "branch": blocks("blocks.{stage}.{block}.bn2", (1, 2, 2, 2, 4, 2)),
    },
    # a ConvNormAct as a whole, since it returns what its norm returns
    "timm/regnety_008": {
        "norm": in_each(REGNETY_008_BLOCKS, "conv2"),
        "branch": in_each(REGNETY_008_BLOCKS, "conv3"),
    },
    # Convolutions in parallel, or in a chain whose links are residual sums.
    "timm/res2net50d": {
        "norm": [f"{block}.bns.{scale}" for block in RESNET_50_BLOCKS for scale in range(3)],
        "branch": in_each(RESNET_50_BLOCKS, "bn3"),
    },
    "timm/skresnet18": dict.fromkeys(
        ("norm", "branch"), blocks("layer{stage}.{block}.conv2", (2, 2, 2, 2), 1)
    ),
    # split attention behind the norm
    "timm/resnest14d": {
        "norm": blocks("layer{stage}.{block}.conv2.bn0", (1, 1, 1, 1), 1),
        "branch": blocks("layer{stage}.{block}.bn3", (1, 1, 1, 1), 1),
    },
    # a gate behind the norm
    "timm/gcresnext26ts": {
        "norm": blocks("stages.{stage}.{block}.conv2_kxk", (2, 2, 2, 2)),
        "branch": blocks("stages.{stage}.{block}.conv3_1x1", (2, 2, 2, 2)),
    },
    "timm/eca_resnet33ts": {
        "norm": blocks("stages.{stage}.{block}.conv2_kxk", (2, 3, 3, 2)),
        "branch": blocks("stages.{stage}.{block}.conv3_1x1", (2, 3, 3, 2)),
    },
    # bottlenecks at both ends, basic blocks between
    "timm/hrnet_w18_small": {
        "norm": in_each([*HRNET_BOTTLENECKS, *HRNET_BASIC_BLOCKS], "bn2"),
        "branch": [*in_each(HRNET_BOTTLENECKS, "bn3"), *in_each(HRNET_BASIC_BLOCKS, "bn2")],
    },
    # a sum that can be folded, and a concatenation that is cut: the whole module ends the branch
    **{
        f"timm/{name}": {
            "norm": in_each(GHOST_BLOCKS, "ghost2.cheap_operation.1"),
            "branch": in_each(GHOST_BLOCKS, "ghost2"),
        }
        for name in ("repghostnet_050", "ghostnetv2_100")
    },
    # blocks whose input is added to a part of the channels have no end of a branch
    "timm/rexnet_100": {
        "norm": [f"features.{block}.conv_dw" for block in range(16)],
        "branch": [f"features.{block}.conv_pwl" for block in (0, 1, 3, 5, 11)],
    },
    "timm/dla34": dict.fromkeys(("norm", "branch"), in_each(DLA_BLOCKS, "bn2")),
    "timm/cspresnet50": {
        "norm": blocks("stages.{stage}.blocks.{block}.conv2", (3, 3, 5, 2)),
        "branch": blocks("stages.{stage}.blocks.{block}.conv3", (3, 3, 5, 2)),
    },
    # the last block of a stage ends in attention; the first has no skip
    "timm/ese_vovnet39b": {
        "norm": blocks("stages.{stage}.blocks.{block}.conv_mid.4", (1, 1, 2, 2)),
        "branch": [
            *(f"stages.{path}.attn" for path in ("0.blocks.0", "1.blocks.0")),
            *(f"stages.{stage}.blocks.0.conv_concat" for stage in (2, 3)),
            *(f"stages.{stage}.blocks.1.attn" for stage in (2, 3)),
        ],
    },
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


def sampled_elsewhere(sample: set[tuple[str, str]]) -> list[object]:
    """Test cases for every network at the other places, likewise."""
    return [
        pytest.param(name, place, marks=[] if (name, place) in sample else pytest.mark.sweep)
        for name, places in HOSTS_ELSEWHERE.items()
        for place in places
    ]


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


def by_hand(model: nn.Module, name: str, e_lambda: float, place: str = "conv") -> nn.Module:
    """A copy of the network with SimAM inserted by hand."""
    model = copy.deepcopy(model)
    for path in HOSTS[name] if place == "conv" else HOSTS_ELSEWHERE[name][place]:
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
    if not any(part in name for part in ("convnext", "dla", "hrnet", "rcnn", "r3d", "vovnet")):
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
