"""Load the authors' weights into networks with SimAM attached.

The authors' networks hold SimAM as a module among others, so some tensors have other names than in
torchvision and timm. This file translates the names. No code from a checkpoint is run.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from .messages import first_few
from .module import SimAM
from .placement import check_module
from .state_dict import compare, load_strictly, recorded_layers, without_profile
from .weights_file import read

E_LAMBDA = 0.1  # of the classifiers for ImageNet and the detectors that the authors published

Model = TypeVar("Model", bound=nn.Module)

# Finds the Sequential that holds SimAM in the authors' networks, by the index of a tensor in it.
# ResNet: (convolution, SimAM), index 0; other networks have the convolution alone. MobileNetV2:
# (convolution, SimAM, norm, ReLU6), index 2, which holds tensors only if SimAM precedes the norm.
_SIMAM_SEQUENTIAL = re.compile(
    r"(?:backbone\.)?(layer\d+\.\d+\.conv2(?=\.0\.)|features\.\d+\.conv\.\d(?=\.2\.))"
)
_TO_TORCHVISION = (
    (r"^(layer\d+\.\d+\.conv2)\.0\.", r"\1."),
    (r"^(features\.\d+\.conv\.\d)\.2\.", r"\1.1."),
    (r"^classifier\.0\.", "classifier.1."),
)
# The classifiers for ImageNet that the authors published, by the number of SimAM layers in each
# stage, and the shapes of the first convolution and of two in the last stage.
_RESNET = ("conv1.weight", "layer4.1.conv1.weight", "layer4.1.conv2.0.weight")
_MOBILENETV2 = ("features.0.0.weight", "features.17.conv.1.0.weight", "features.18.0.weight")
_BASIC = ((64, 3, 7, 7), (512, 512, 3, 3), (512, 512, 3, 3))
_BOTTLENECK = ((64, 3, 7, 7), (512, 2048, 1, 1), (512, 512, 3, 3))
_PUBLISHED = {
    ((2, 2, 2, 2), _BASIC),  # ResNet-18
    ((3, 4, 6, 3), _BASIC),  # ResNet-34
    ((3, 4, 6, 3), _BOTTLENECK),  # ResNet-50
    ((3, 4, 23, 3), _BOTTLENECK),  # ResNet-101
    ((3, 4, 6, 3), ((64, 3, 7, 7), (1024, 2048, 1, 1), (1024, 32, 3, 3))),  # ResNeXt-50 32x4d
    ((17,), ((32, 3, 3, 3), (960, 1, 3, 3), (1280, 320, 1, 1))),  # MobileNetV2
}
_HEADS = {"fc", "classifier", "conv_head", "bn2"}  # absent from a network without classifier


def load_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load the authors' weights into a network with SimAM, safely and strictly.

    The file is one of the authors' classifiers for ImageNet (ResNet-18, 34, 50, 101, ResNeXt-50
    32x4d, MobileNetV2), one of their detectors, of which the backbone is loaded, or of another
    network that was trained with their code. The model has the same names except for SimAM: for
    ImageNet a torchvision or timm network with SimAM attached, or a model of `simam.models`; for
    CIFAR a network with the authors' names. If the model has a backbone, as torchvision's
    detectors have, the weights go into the backbone, and the rest of the model is unchanged. If
    the network has no classifier, the classifier of the file is left out. A file with the
    network's own names loads too.

    Only tensors are read from the file. The file must fill every tensor of the network, except
    the batch counts of norms. Buffers that thop's `profile` leaves (`total_ops`, `total_params`)
    are skipped.

    The authors trained their classifiers for ImageNet and their detectors with `e_lambda=0.1`, so
    these files set `e_lambda` to 0.1 on every SimAM layer. No other file of theirs tells its
    `e_lambda`, which is 1e-4 on CIFAR, so the network keeps its own.

    Args:
        model (nn.Module): the network, changed in place.
        path (str or PathLike): a file written by `torch.save`, or a `.safetensors` file. It holds
            a state dict, or a dict with a state dict as "state_dict" or "model".

    Returns:
        nn.Module: the same model.

    Raises:
        TypeError: model is not a module.
        OSError: the file cannot be opened.
        ValueError: the model has no SimAM, or has SimAM after other convolutions than the file's
            network; or the file is damaged, could run code, holds no state dict, or does not fit.
            For a file that does not fit, the message lists the names that are missing, unexpected
            or of another shape. The model is unchanged.
        ImportError: the file is a `.safetensors` file, and safetensors is not installed.

    Warns:
        UserWarning: the `e_lambda` of a SimAM layer was changed; the file does not tell its
            `e_lambda`; or the file records SimAM at other places or with other options than the
            network has, as files of this library do.

    Source:
        Yang et al., ICML 2021, and the files published with the paper.

    Examples:
        >>> import tempfile, torch
        >>> from simam import attach
        >>> net = attach(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), where="0")
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"state_dict": {"module.0.weight": torch.ones(2, 1, 3, 3)}}, file.name)
        ...     load_checkpoint(net, file.name)[0].weight.sum()
        tensor(18., grad_fn=<SumBackward0>)
    """
    check_module(model)
    network = _backbone(model)
    layers = {p: m for p, m in network.named_modules() if isinstance(m, SimAM)}
    if not layers:
        raise ValueError(
            f"this {type(network).__name__} has no SimAM; attach it first: "
            f"simam.attach(model, e_lambda={E_LAMBDA})"
        )
    own = network.state_dict()
    content = without_profile(read(path), own)
    translated = is_authors(key for key in content if key not in own)
    state = rename(content, own) if translated else content
    wrong = compare(state, own)
    if wrong:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}, which has {len(own)} tensors: "
            f"{wrong}. The model is unchanged; build the network that the file was saved from"
        )
    _check_placement(path, content, own, layers)
    load_strictly(network, state, str(path))
    e_lambda = trained_e_lambda(content)
    if e_lambda is None and translated:
        kept = {layer.e_lambda for layer in layers.values()}
        warnings.warn(unknown_e_lambda(path, kept), stacklevel=2)
    elif e_lambda is not None and (translated or not recorded_layers(content)):
        _set_e_lambda(model, layers.values(), e_lambda)
    return model


def is_authors(keys: Iterable[str]) -> bool:
    """Check whether tensors have the names of the authors' networks.

    torchvision's `r3d_18` has such names, too: names that a network has itself prove nothing.
    """
    return any(map(_SIMAM_SEQUENTIAL.match, keys))


def trained_e_lambda(state: Mapping[str, Tensor]) -> float | None:
    """Return the e_lambda that an authors' network was trained with, or None if it is not known.

    A network with SimAM of this library records it. The authors' networks do not, but all of their
    classifiers for ImageNet and of their detectors have the same.
    """
    layers = (recorded_layers(state) or {}).values()
    recorded = {layer["e_lambda"] for layer in layers if layer}
    if recorded:
        return recorded.pop() if len(recorded) == 1 else None
    return E_LAMBDA if _is_published(state) else None


def unknown_e_lambda(source: object, kept: Iterable[float]) -> str:
    """Say that a file does not tell its e_lambda, and which the network keeps."""
    return (
        f"{source} does not tell the e_lambda that its weights were trained with; this network "
        f"keeps {', '.join(f'{value:g}' for value in sorted(kept))}. The authors use 1e-4 on CIFAR "
        "and 0.1 on ImageNet and COCO"
    )


def _is_published(state: Mapping[str, Tensor]) -> bool:
    """Check whether tensors are of a network whose weights the authors published."""
    shapes = {key.removeprefix("backbone."): tuple(tensor.shape) for key, tensor in state.items()}
    layers = {match[1] for match in map(_SIMAM_SEQUENTIAL.match, state) if match}
    stages = Counter(path.partition(".")[0] for path in layers)
    depths = tuple(stages[stage] for stage in sorted(stages))
    names = _RESNET if "conv1.weight" in shapes else _MOBILENETV2
    classes = shapes.get("fc.weight") or shapes.get("classifier.0.weight") or (0,)
    is_detector = any(key.startswith("rpn_head.") for key in state)
    is_known = (depths, tuple(shapes.get(name, ()) for name in names)) in _PUBLISHED
    return is_known and (is_detector or classes[0] == 1000)


def rename(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Rename the tensors of an authors' network to the names of a torchvision or timm network.

    Args:
        state (dict of str to Tensor): the state dict of the authors' network.
        own (collection of str): the names in the torchvision or timm network.

    Returns:
        dict of str to Tensor: the renamed tensors. If the file holds a detector, only the tensors
            of its backbone; if the network has no classifier, only those before the classifier.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {k[len("backbone.") :]: t for k, t in state.items() if k.startswith("backbone.")}
    heads = _HEADS - {key.partition(".")[0] for key in own}
    renamed = {_name(key, own): tensor for key, tensor in state.items()}
    return {key: t for key, t in renamed.items() if key.partition(".")[0] not in heads}


def _backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of a torchvision detection or segmentation model, else the model."""
    backbone = getattr(model, "backbone", model)
    body = getattr(backbone, "body", backbone)
    return body if isinstance(body, nn.Module) else model


def _name(key: str, own: Collection[str]) -> str:
    """Translate the name of a tensor in the authors' networks."""
    if key in own:  # a network with the authors' structure
        return key
    for pattern, replacement in _TO_TORCHVISION:
        key = re.sub(pattern, replacement, key)
    if "conv_stem.weight" in own:
        module, _, tensor = key.rpartition(".")
        return f"{_TIMM_MOBILENETV2.get(module, module)}.{tensor}"
    return key


def _timm_mobilenetv2() -> dict[str, str]:
    """Map the names of modules in torchvision's MobileNetV2 to the names in timm's."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
    names |= {"features.18.0": "conv_head", "features.18.1": "bn2"}
    expanded = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
    expanded |= {"2": "conv_pwl", "3": "bn3"}
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    blocks = [(s, b) for s, depth in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(depth)]
    for number, (stage, block) in enumerate(blocks, 1):
        for theirs, timm in (expanded if number > 1 else first).items():
            names[f"features.{number}.conv.{theirs}"] = f"blocks.{stage}.{block}.{timm}"
    return names


_TIMM_MOBILENETV2 = _timm_mobilenetv2()


def _check_placement(
    path: str | os.PathLike[str],
    state: Collection[str],
    own: Collection[str],
    layers: Collection[str],
) -> None:
    """Reject a network whose SimAM placement differs from the checkpoint's.

    The tensors would fit, but the outputs would differ.
    """
    matches = (_SIMAM_SEQUENTIAL.match(key) for key in state if key not in own)
    sequentials = {match[1] for match in matches if match}
    if not sequentials:  # a file with the network's own names, which do not show where SimAM is
        return
    theirs = {_name(f"{path}.0.weight", own).removesuffix(".weight") for path in sequentials}
    ours = {layer.removesuffix(".simam") for layer in layers}
    wrong = {
        "with SimAM only in the file": sorted(theirs - ours),
        "with SimAM only in the network": sorted(ours - theirs),
    }
    problems = [
        f"{len(paths)} {what}: {first_few(paths)}" for what, paths in wrong.items() if paths
    ]
    if problems:
        raise ValueError(
            f"{path} has SimAM after {len(theirs)} convolutions, but this network after others: "
            f"{'; '.join(problems)}. Attach SimAM without where= and exclude="
        )


def _set_e_lambda(model: nn.Module, layers: Collection[SimAM], e_lambda: float) -> None:
    replaced = [layer.e_lambda for layer in layers if layer.e_lambda != e_lambda]
    for layer in layers:
        layer.e_lambda = e_lambda
    arguments = getattr(model, "_model_args", {})  # timm's save_for_hf writes them to the file
    if "e_lambda" in arguments:
        arguments["e_lambda"] = e_lambda
    if replaced:
        warnings.warn(
            f"set e_lambda={e_lambda} on {len(replaced)} SimAM layers, because these weights were "
            f"trained with it; it was {', '.join(f'{v:g}' for v in sorted(set(replaced)))}",
            stacklevel=3,
        )
